"""`svdecode generate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from svdecode.cli.conversation import first_messages, talk
from svdecode.cli.options import STDIN, DeviceMapOption, JsonOption, ModelOption, from_stdin, quiet
from svdecode.common.files import to_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def generate(
    adapter: Annotated[Path, typer.Option("--adapter", help="Folder of the adapter.")],
    prompt: Annotated[
        str | None,
        typer.Argument(
            help="The prompt; - reads it from stdin, without the line break at the end. With --chat and without a prompt, "
            "each line of stdin is a turn."
        ),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt into the model's chat template, as the user's turn.")
    ] = False,
    system: Annotated[str | None, typer.Option("--system", help="System turn of --chat.")] = None,
    model: ModelOption = None,
    device_map: DeviceMapOption = None,
    mu: Annotated[
        float | None, typer.Option(help="Steering strength. Default: the calibration beside the adapter.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Stop after this many tokens.")] = 64,
    temperature: Annotated[
        float | None,
        typer.Option(help="0 is greedy decoding. Default: 0, and 1 where --top-k or --top-p is given."),
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample among the k most probable tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Sample among the most probable tokens that have this probability together.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Answer a prompt from the steered distribution.

    With --chat and without a prompt: talk, line by line. Ctrl-D ends the talk, Ctrl-C an answer.
    """
    _check_chat(prompt, chat, system)
    if temperature is None:
        temperature = 0.0 if top_k is None and top_p is None else 1.0
    elif temperature == 0 and (top_k is not None or top_p is not None):
        raise ValueError("--top-k and --top-p sample, and --temperature 0 is greedy: leave --temperature out")
    from svdecode.strength.calibration import Calibration

    strength = Calibration.from_pretrained(adapter) if mu is None else mu
    text = from_stdin() if prompt == STDIN else prompt
    quiet()
    import torch

    from svdecode.data.batches import prompt_ids
    from svdecode.data.chat import end_of_turn, prompt_tokens
    from svdecode.decoding.generate import generate as decode
    from svdecode.models.base_model import base_name, load_base_tokenizer, load_with_adapter
    from svdecode.models.loading import check_adapter_folder
    from svdecode.models.steer import steer

    check_adapter_folder(adapter)
    messages = first_messages(system)
    if chat:  # a template that is missing or refuses the turns is said before the model is loaded
        prompt_tokens(load_base_tokenizer(model, adapter), [*messages, {"role": "user", "content": text or "?"}])
    adapted, tokenizer = load_with_adapter(model, adapter, device_map)
    steered = steer(adapted, mu=strength)
    generator = torch.Generator(steered.device).manual_seed(seed)
    ends = _ends(steered, tokenizer.eos_token_id, end_of_turn(tokenizer)) if chat else None

    def new_tokens(prompt: list[int], streamer: Any = None) -> list[int]:
        _check_length(len(prompt), max_new_tokens, steered)
        ids = torch.tensor([prompt], dtype=torch.long, device=steered.device)
        tokens = decode(
            steered,
            ids,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            eos_token_id=ends,
            generator=generator,
            streamer=streamer,
        )
        return tokens[0, len(prompt) :].tolist()

    if text is None:
        talk(new_tokens, tokenizer, messages, lambda turns: prompt_tokens(tokenizer, turns)[1], as_json=as_json)
        return
    if chat:
        rendered, ids = prompt_tokens(tokenizer, [*messages, {"role": "user", "content": text}])
    else:
        rendered, ids = text, prompt_ids(text, tokenizer)
    new = new_tokens(ids)
    answer = tokenizer.decode(new, skip_special_tokens=True)
    if not as_json:
        print(answer)
        return
    report = {
        "prompt": rendered, "answer": answer, "prompt_tokens": len(ids), "new_tokens": len(new),
        "model": base_name(model, adapter), "adapter": str(adapter), **steered.settings._asdict(),
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed,
    }  # fmt: skip
    print(to_json(report))


def _check_chat(prompt: str | None, chat: bool, system: str | None) -> None:
    if prompt is None and not chat:
        raise ValueError("a prompt is needed: svdecode generate --adapter FOLDER PROMPT (or --chat for a conversation)")
    if system is not None and not chat:
        raise ValueError("--system is a turn of --chat: pass --chat too")


def _ends(steered: PreTrainedModel, eos: int | None, turn: list[int]) -> list[int]:
    """The tokens that end an answer: those of the generation config, of the tokenizer and of the chat template."""
    from svdecode.decoding.generate import end_tokens

    return sorted({token for token in (*end_tokens(steered), eos, *turn) if token is not None})


def _check_length(prompt: int, new: int, model: PreTrainedModel) -> None:
    """ValueError where a prompt and its answer are longer than the model's positions."""
    from svdecode.models.reach import most_positions

    limit = most_positions(model)
    if limit is not None and prompt + new > limit:
        raise ValueError(
            f"--max-new-tokens {new} after a prompt of length {prompt} is more than the model's {limit} positions: "
            "shorten the prompt or lower --max-new-tokens"
        )
