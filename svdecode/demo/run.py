"""The demo: a pre-trained model, its warm start and SVDecode side by side on real text."""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel

import svdecode
from svdecode.calibration.calibrate import calibrate
from svdecode.calibration.collect import collect_tokens
from svdecode.common.files import write_atomically
from svdecode.common.intervals import bootstrap_interval, wilson
from svdecode.data.examples import read_examples
from svdecode.decoding.answers import answer_all
from svdecode.demo.facts import Splits, country_facts
from svdecode.demo.measure import nll_of_all_tokens, tokens_per_second
from svdecode.models.adapters import pretrained_of
from svdecode.models.loading import BUNDLED_NAME, load_adapter, load_model
from svdecode.models.steer import steer
from svdecode.strength.calibration import Calibration
from svdecode.warmstart.folder import is_complete, step_folder
from svdecode.warmstart.train import warmstart

SIZES = (192, 96, 120)  # training, calibration and test examples
LEARNING_RATE, BATCH_SIZE = 2e-4, 4
CHECKPOINTS = (12, 24, 36, 48)  # of the warm start's 48 steps
EVALUATION_BATCH = 16


class Demo:
    """One run: its settings, the times of its phases and what it found."""

    def __init__(
        self,
        *,
        model: str | None,
        adapter: Path | None,
        data: Path | None,
        output: Path,
        seed: int,
        progress: bool,
    ) -> None:
        """Keep the arguments and read the data; no model is loaded yet."""
        self.model_name, self.adapter, self.data = model, adapter, data
        self.output, self.seed, self.progress = output, seed, progress
        self.rows = None if data is None else read_examples(data)
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure a phase."""
        start = time.perf_counter()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - start, 1)

    def splits(self) -> Splits:
        """The user's examples, three fifths for training, one for calibration and one for the test; or country facts."""
        if self.data is None:
            return country_facts(SIZES, self.seed, self.tokenizer, bundled=self.model_name is None)
        rows = self.rows
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.seed)).tolist()
        rows = [rows[i] for i in order]
        first, second = len(rows) * 3 // 5, len(rows) * 4 // 5
        if not first or first == second or second == len(rows):
            raise ValueError(f"{self.data} has {len(rows)} examples: 5 are needed for three splits")
        return Splits(rows[:first], rows[first:second], rows[second:])

    def run(self) -> dict[str, object]:
        """Everything; the report also lies in `output`, with the figure."""
        with self.phase("load"):
            base, self.tokenizer = load_model(self.model_name)
        splits = self.splits()
        model, steps = self.warm_start(base, splits)
        with self.phase("calibrate"):
            calibration = self.calibration(model, splits)
        steered = steer(model, mu=calibration)
        pretrained = pretrained_of(model.get_base_model())
        report = {
            "model": self.model_name or BUNDLED_NAME,
            "examples": dict(zip(Splits._fields, map(len, splits), strict=True)),
            "mu": calibration.mu,
            "estimates": calibration.estimates,
            "coverage": calibration.coverage,
        }
        with self.phase("held-out NLL"):
            report["held_out"] = self.held_out(model, splits, calibration)
            report["nll_all_tokens"] = nll_of_all_tokens(steered, splits.test, self.tokenizer, EVALUATION_BATCH)
        with self.phase("answers"):
            generators = {
                "pre-trained": functools.partial(pretrained.generate, do_sample=False),
                "warm start": functools.partial(model.generate, do_sample=False),
                "SVDecode": functools.partial(svdecode.generate, steered),
            }
            report |= self.answers(generators, splits, model.device)
        with self.phase("speed"):
            forced = {
                name: functools.partial(generate, eos_token_id=[]) if name == "SVDecode" else _without_end(generate)
                for name, generate in generators.items()
            }
            prompt = self.tokenizer(splits.test[0]["prompt"], return_tensors="pt").input_ids.to(model.device)
            report["tokens_per_second"] = tokens_per_second(forced, prompt)
        with self.phase("steps"):
            report["steps"] = self.steps(model, splits, steps) if steps else []
        report["seconds"] = self.seconds
        self.finish(report, calibration)
        return report

    def warm_start(self, base: object, splits: Splits) -> tuple[PeftModel, tuple[int, ...]]:
        """The user's adapter; or that of an earlier run with the same settings; or a new one."""
        if self.adapter is not None:
            with self.phase("warm start"):
                return load_adapter(base, self.adapter), ()
        folder = self.output / "adapter"
        total = -(-len(splits.train) // BATCH_SIZE)
        steps = (*(step for step in CHECKPOINTS if step < total), total)
        key = self.key(splits)
        with self.phase("warm start"):
            saved = folder / "demo.json"
            known = saved.is_file() and json.loads(saved.read_text()).get("key") == key
            self.cached = known and is_complete(folder)
            if self.cached:
                return load_adapter(base, folder), steps
            model = warmstart(
                base,
                self.tokenizer,
                splits.train,
                folder,
                learning_rate=LEARNING_RATE,
                batch_size=BATCH_SIZE,
                save_steps=steps,
                seed=self.seed,
                progress=self.progress,
            )
            write_atomically(saved, json.dumps({"key": key}).encode())
        return model, steps

    def key(self, splits: Splits) -> str:
        """Names what an adapter was trained on and how."""
        settings = (
            self.model_name,
            splits.train,
            splits.calibration,
            splits.test,
            LEARNING_RATE,
            BATCH_SIZE,
            self.seed,
        )
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()

    def calibration(self, model: PeftModel, splits: Splits, progress: bool = True) -> Calibration:
        """Calibrate and save the result beside the adapter, unless the adapter is the user's."""
        found = calibrate(
            model,
            splits.calibration,
            tokenizer=self.tokenizer,
            batch_size=EVALUATION_BATCH,
            progress=self.progress and progress,
        )
        if self.adapter is None and progress:
            found.save_pretrained(self.output / "adapter")
        return found

    def held_out(self, model: PeftModel, splits: Splits, calibration: Calibration) -> dict[str, object]:
        """NLL of the kept gold tokens of the test split, warm start and SVDecode, and their paired difference."""
        tokens = collect_tokens(
            model,
            splits.test,
            tokenizer=self.tokenizer,
            batch_size=EVALUATION_BATCH,
            progress="held-out NLL" if self.progress else None,
        )
        plain, steered = tokens.nll(0.0), tokens.nll(calibration.mu)
        return {
            "coverage": tokens.coverage,
            "warm start": plain.mean().item(),
            "SVDecode": steered.mean().item(),
            "difference": (steered - plain).mean().item(),
            "interval": bootstrap_interval(steered - plain, self.seed),
        }

    def answers(self, generators: dict, splits: Splits, device: torch.device) -> dict[str, object]:
        """Exact match of greedy answers, paired difference, and three questions to look at."""
        found = {
            name: answer_all(
                generate,
                self.tokenizer,
                splits.test,
                name=name,
                device=device,
                progress=self.progress,
                batch_size=EVALUATION_BATCH,
            )
            for name, generate in generators.items()
        }
        warm, steered = (torch.tensor(found[name].correct).double() for name in ("warm start", "SVDecode"))
        differs = [i for i in range(len(splits.test)) if found["warm start"].texts[i] != found["SVDecode"].texts[i]]
        shown = (differs + [i for i in range(len(splits.test)) if i not in differs])[:3]
        return {
            "exact_match": {
                name: {"accuracy": a.accuracy, "interval": wilson(sum(a.correct), len(a.correct))}
                for name, a in found.items()
            },
            "exact_match_difference": {
                "difference": (steered - warm).mean().item(),
                "interval": bootstrap_interval(steered - warm, self.seed),
            },
            "answers_that_differ": len(differs),
            "samples": [
                {
                    "prompt": splits.test[i]["prompt"],
                    "gold": splits.test[i]["completion"].strip(),
                    **{name: a.texts[i] for name, a in found.items()},
                }
                for i in shown
            ],
        }

    def steps(self, model: PeftModel, splits: Splits, steps: tuple[int, ...]) -> list[dict[str, object]]:
        """Held-out NLL after each checkpoint, each with its own calibration; from the last run where that was the same."""
        saved = self.output / "adapter" / "steps.json"
        if self.cached and saved.is_file():
            return json.loads(saved.read_text())
        rows = []
        for step in steps:
            name = f"step-{step}"
            model.load_adapter(str(step_folder(self.output / "adapter", step)), adapter_name=name)
            model.set_adapter(name)
            calibration = self.calibration(model, splits, progress=False)
            rows.append({"step": step, "mu": calibration.mu, **self.held_out(model, splits, calibration)})
        model.set_adapter("default")
        write_atomically(saved, json.dumps(rows, indent=2).encode())
        return rows

    def finish(self, report: dict[str, object], calibration: Calibration) -> None:
        """Write the figure and the report."""
        from svdecode.demo.figure import plot_demo

        figure = self.output / "demo.png"
        self.output.mkdir(parents=True, exist_ok=True)
        plot_demo(report, calibration, figure)
        report["figure"] = str(figure)
        write_atomically(self.output / "demo.json", json.dumps(report, indent=2).encode())


def _without_end(generate: functools.partial) -> functools.partial:
    """The same generator, going on after an end-of-sequence token, so that speeds compare equal work."""

    def run(ids: torch.Tensor, *, attention_mask: torch.Tensor, max_new_tokens: int) -> torch.Tensor:
        return generate(
            ids, attention_mask=attention_mask, max_new_tokens=max_new_tokens, min_new_tokens=max_new_tokens
        )

    return run
