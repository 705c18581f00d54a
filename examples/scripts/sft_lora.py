"""Supervised fine-tuning of an adapter: trl's SFTTrainer, peft's LoRA.

`torchrun --nproc-per-node 2 sft_lora.py --tsp`, or `python sft_lora.py`
"""

import argparse
import json

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import SFTConfig, SFTTrainer

import tspc.trainer

parser = argparse.ArgumentParser()
parser.add_argument("--tsp", action="store_true")
parser.add_argument("--steps", type=int, default=3)
parser.add_argument("--rank", type=int, default=1)
parser.add_argument("--out", default="sft")
args = parser.parse_args()

if args.tsp:
    tspc.trainer.register()
set_seed(0)
words = ["<unk>", "<pad>", "</s>", *(f"w{i}" for i in range(61))]
raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
raw.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=raw, unk_token="<unk>", pad_token="<pad>", eos_token="</s>"
)
lengths = torch.randint(6, 20, (32,)).tolist()
texts = [" ".join(f"w{i}" for i in torch.randint(0, 61, (n,)).tolist()) for n in lengths]
config = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    pad_token_id=1,
    eos_token_id=2,
)
trainer = SFTTrainer(
    LlamaForCausalLM(config),
    SFTConfig(
        args.out,
        max_steps=args.steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=args.steps,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        torch_compile_backend="tsp" if args.tsp else None,
    ),
    train_dataset=Dataset.from_dict({"text": texts}),
    processing_class=tokenizer,
    peft_config=LoraConfig(
        r=args.rank, lora_alpha=4, lora_dropout=0.0, target_modules=["q_proj", "v_proj", "up_proj"]
    ),
)
trainer.train()
logged = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens")
losses = [entry[k] for entry in trainer.state.log_history for k in logged if k in entry]
if trainer.is_world_process_zero():
    print(json.dumps(losses))
