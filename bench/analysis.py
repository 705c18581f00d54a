"""How long the front end takes by number of layers: capture, analysis and rewriting together.

`python bench/analysis.py --layers 8 32 --profile 15`: CPU seconds on one core, rules applied, and
where the time of the rewriting goes.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from tspc.base.options import Options
from tspc.frontend import capture as front
from tspc.frontend.capture import Captured


def model_of(name: str, layers: int) -> torch.nn.Module:
    import transformers as t

    sizes = {
        "vocab_size": 2048,
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
    }
    if name == "gpt_neox":
        return t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**sizes))
    grouped = sizes | {"num_key_value_heads": 4, "head_dim": 32}
    return t.Qwen3ForCausalLM(t.Qwen3Config(**grouped))


class _Stop(Exception):
    pass


def captured_of(model: torch.nn.Module, length: int = 64) -> tuple[Captured, float]:
    """The captured program and the CPU seconds of its capture, Dynamo's apart."""
    found: list[tuple[Captured, float]] = []

    def backend(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        start = time.process_time()
        captured = front.capture(gm, example_inputs)
        found.append((captured, time.process_time() - start))
        raise _Stop

    tokens = torch.zeros(2, length, dtype=torch.long)
    torch._dynamo.reset()
    try:
        torch.compile(model, backend=backend, dynamic=True)(input_ids=tokens, labels=tokens)
    except Exception:
        if not found:
            raise
    return found[0]


def rewritten(captured: Captured, ranks: int = 4) -> tuple[float, int]:
    """CPU seconds, and how often a rule was applied."""
    start = time.process_time()
    made = captured.rewritten(ranks, "tsp", Options(), "cpu")
    seconds = time.process_time() - start
    return seconds, len(made.analysis.records)


def profiled(captured: Captured, top: int) -> None:
    profile = cProfile.Profile()
    profile.enable()
    captured.rewritten(4, "tsp", Options(), "cpu")
    profile.disable()
    pstats.Stats(profile).sort_stats("cumulative").print_stats("passes|tspc|sympy/core/cache", top)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="qwen3", choices=["qwen3", "gpt_neox"])
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--profile", type=int, default=0, help="lines of the profile")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for layers in args.layers:
        captured, capture = captured_of(model_of(args.model, layers))
        seconds, rules = rewritten(captured)
        nodes = len(captured.program.nodes)
        row = {"model": args.model, "layers": layers, "nodes": nodes, "rules": rules}
        rows.append(row | {"capture": round(capture, 2), "rewriting": round(seconds, 2)})
        print(rows[-1], flush=True)
        if args.profile:
            profiled(captured, args.profile)
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
