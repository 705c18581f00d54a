"""Preferences: trl's DPOTrainer, the reference a frozen copy of the model.

`torchrun --nproc-per-node 2 dpo.py --tsp`, or `python dpo.py`
"""

import argparse
import json

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import DPOConfig, DPOTrainer

import tspc.trainer

parser = argparse.ArgumentParser()
parser.add_argument("--tsp", action="store_true")
parser.add_argument("--steps", type=int, default=3)
parser.add_argument("--out", default="dpo")
args = parser.parse_args()

if args.tsp:
    tspc.trainer.register()
words = ["<unk>", "<pad>", "</s>", *(f"w{i}" for i in range(61))]
raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
raw.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=raw, unk_token="<unk>", pad_token="<pad>", eos_token="</s>"
)


def texts(seed):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, 61, (16, 6), generator=generator).tolist()
    return ["".join(f" w{i}" for i in ids) for ids in drawn]


def build():
    set_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=1,
            eos_token_id=2,
        )
    )


trainer = DPOTrainer(
    build(),
    build(),
    DPOConfig(
        args.out,
        max_steps=args.steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        torch_compile_backend="tsp" if args.tsp else None,
    ),
    train_dataset=Dataset.from_dict({"prompt": texts(0), "chosen": texts(1), "rejected": texts(2)}),
    processing_class=tokenizer,
)
trainer.train()
logged = ("loss", "grad_norm", "rewards/margins", "logps/chosen", "logps/rejected")
losses = [entry[k] for entry in trainer.state.log_history for k in logged if k in entry]
if trainer.is_world_process_zero():
    print(json.dumps(losses))
