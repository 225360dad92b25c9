#!/usr/bin/env python3
"""Small random checkpoints, a tiny tokenizer, and what transformers makes of them: the goldens in tests/data.

Needs torch==2.11.0 transformers==5.17.0 tokenizers==0.23.2 safetensors. For developers; the results are committed.

    python3 tools/reference.py                    # rewrites tests/data, except smollm2.json
    python3 tools/reference.py --smollm2 DIR      # rewrites tests/data/smollm2.json from tools/smollm2.py's folder

The layout of the goldens is in tests/data/README.md.
"""

import argparse
import dataclasses
import json
import pathlib
import re
import shutil

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers.utils import logging

DATA = pathlib.Path(__file__).resolve().parent.parent / "tests" / "data"
NEW_TOKENS = 16
# Below this a difference in rounding could pick the other token.
MARGIN_MIN = 0.05
MARGIN_MIN_SMOLLM2 = 0.02


@dataclasses.dataclass
class Checkpoint:
    """A folder of tests/data: what it is, and what it is there for."""

    name: str
    config: object
    dtype: torch.dtype = torch.float32
    old_spelling: bool = False  # torch_dtype, rope_theta, rope_scaling
    rope_type_key: str = "rope_type"  # of an old rope_scaling: "type" or "rope_type"
    shard_size: str = "1GB"
    chat: bool = False  # with tests/data/tokenizer inside, and prompts of text


def llama3(theta, factor, original):
    # An original length so short that the three bands (kept, blended, stretched) all occur within a test's prompt.
    scaling = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": original}
    return {"rope_type": "llama3", "rope_theta": theta, **scaling}


def plain(theta):
    return {"rope_type": "default", "rope_theta": theta}


def shape(dim, ffn, layers, heads, kv_heads, vocab, **more):
    return dict(
        hidden_size=dim,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        max_position_embeddings=256,
        **more,
    )


def checkpoints(chat_vocab):
    return [
        Checkpoint(
            "llama3-tied",
            LlamaConfig(
                **shape(48, 52, 2, 6, 2, 131, rms_norm_eps=1e-5, tie_word_embeddings=True),
                rope_parameters=llama3(500.0, 8.0, 32),
            ),
            old_spelling=True,
        ),
        Checkpoint(
            "llama-bias",
            LlamaConfig(
                **shape(40, 52, 2, 5, 1, 131, rms_norm_eps=1e-6, attention_bias=True, mlp_bias=True),
                rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
            ),
            old_spelling=True,
            rope_type_key="type",
        ),
        Checkpoint(
            "mistral-sharded",
            MistralConfig(
                **shape(32, 52, 3, 4, 2, 131, rms_norm_eps=1e-5, head_dim=12, sliding_window=12),
                rope_parameters=plain(10000.0),
            ),
            shard_size="60KB",
        ),
        Checkpoint(
            "qwen2-window",
            Qwen2Config(
                **shape(40, 52, 4, 4, 4, 131, rms_norm_eps=1e-6),
                use_sliding_window=True,
                sliding_window=10,
                max_window_layers=2,
                rope_parameters=plain(1000000.0),
            ),
            dtype=torch.bfloat16,
            old_spelling=True,
        ),
        Checkpoint(
            "qwen3",
            Qwen3Config(
                **shape(40, 84, 3, 6, 2, 257, rms_norm_eps=1e-6, head_dim=16, tie_word_embeddings=True),
                rope_parameters=plain(1000000.0),
            ),
            dtype=torch.float16,
        ),
        Checkpoint(
            "chat-llama",
            LlamaConfig(
                **shape(40, 52, 4, 4, 2, chat_vocab, rms_norm_eps=1e-5, tie_word_embeddings=True),
                rope_parameters=llama3(1000.0, 4.0, 64),
                bos_token_id=1,
                eos_token_id=2,
            ),
            dtype=torch.bfloat16,
            chat=True,
        ),
    ]


def main():
    args = argparse.ArgumentParser(description="Rewrites the goldens in tests/data.")
    args.add_argument("--smollm2", type=pathlib.Path, metavar="DIR", help="only smollm2.json, from this folder")
    args = args.parse_args()
    torch.set_grad_enabled(False)
    logging.disable_progress_bar()
    if args.smollm2:
        write_smollm2(args.smollm2)
        return
    write_tokenizer(DATA / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(DATA / "tokenizer")
    for c in checkpoints(len(tokenizer)):
        write_checkpoint(c, tokenizer)


# ---- checkpoints ----


def write_checkpoint(c, tokenizer):
    """Tries seeds until greedy decoding is decisive, in f32 and in the checkpoint's dtype, and does not only repeat itself."""
    folder = DATA / c.name
    for seed in range(1, 500):
        shutil.rmtree(folder, ignore_errors=True)
        save(c, folder, seed)
        prompts = chat_prompts(tokenizer) if c.chat else random_prompts(c.config.vocab_size, seed)
        golden, logits = references(folder, prompts, torch.float32)
        if golden["margin_min"] < MARGIN_MIN or any(len(set(p["greedy"])) < 6 for p in golden["prompts"]):
            continue
        golden = {"dtype": str(c.dtype).removeprefix("torch."), "seed": seed, "vocab": c.config.vocab_size, **golden}
        golden["logits"] = "logits.f32"
        if c.dtype != torch.float32:
            native, native_logits = references(folder, prompts, c.dtype)
            if [p["greedy"] for p in native["prompts"]] != [p["greedy"] for p in golden["prompts"]]:
                continue
            golden["logits_native"] = "logits_native.f32"
            golden["native_difference_max"] = round((native_logits - logits).abs().max().item(), 4)
            write_f32(folder / "logits_native.f32", native_logits)
        write_f32(folder / "logits.f32", logits)
        if c.chat:
            for p in golden["prompts"]:
                p["greedy_text"] = tokenizer.decode(p["greedy"], skip_special_tokens=True)
        write_json(folder / "golden.json", golden)
        size = sum(f.stat().st_size for f in folder.iterdir())
        print(f"{c.name}: seed {seed}, margin {golden['margin_min']}, {size / 1e3:.0f} kB", golden.get("native_difference_max", ""))
        return
    raise SystemExit(f"error: {c.name}: no seed gives decisive logits")


def save(c, folder, seed):
    model = AutoModelForCausalLM.from_config(c.config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        weight.copy_(1 + 0.2 * noise if "norm" in name else scale(name) * noise)
    model.to(c.dtype).save_pretrained(folder, max_shard_size=c.shard_size)
    (folder / "generation_config.json").unlink()
    if c.shard_size != "1GB":
        assert len(list(folder.glob("*.safetensors"))) == 3, "the sharded checkpoint has three files"
    if c.old_spelling:
        spell_as_before(folder / "config.json", c.rope_type_key)
    if c.chat:
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(DATA / "tokenizer" / file, folder / file)
        settings = {"bos_token_id": 1, "eos_token_id": [2, 0], "pad_token_id": 0}
        settings |= {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05}
        write_json(folder / "generation_config.json", settings)


def scale(name):
    """Large enough that attention is not uniform and the best token stands out."""
    if "embed" in name or "lm_head" in name:
        return 0.5
    return 0.3 if name.endswith("bias") else 0.25


def spell_as_before(path, rope_type_key):
    """config.json as transformers 4 wrote it."""
    config = json.loads(path.read_text())
    config["torch_dtype"] = config.pop("dtype")
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {rope_type_key: kind, **rope}
    config.pop("layer_types", None)
    write_json(path, config)


def random_prompts(vocab, seed):
    """One token; a few; more than a window of 12; much more, so that rows leave every window."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return [{"ids": torch.randint(vocab, (n,), generator=generator).tolist()} for n in (1, 5, 17, 40)]


def chat_prompts(tokenizer):
    chats = [
        [{"role": "user", "content": "Hello"}],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "你好，世界"}],
    ]
    return [{"messages": m, **templated(tokenizer, m)} for m in chats]


def templated(tokenizer, messages):
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return {"text": text, "ids": tokenizer.encode(text, add_special_tokens=False)}


# ---- what transformers says ----


def references(folder, prompts, dtype):
    """Greedy tokens of every prompt, and the logits of all prompt positions, one prompt after the other."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
    golden, rows = [], []
    for prompt in prompts:
        greedy, margin = decode(model, prompt["ids"], NEW_TOKENS)
        first_row = sum(len(r) for r in rows)
        rows.append(model(torch.tensor([prompt["ids"]])).logits[0].float())
        golden.append({**prompt, "greedy": greedy, "margin_min": round(margin, 4), "logits_first_row": first_row})
    return {"margin_min": min(p["margin_min"] for p in golden), "prompts": golden}, torch.cat(rows)


def decode(model, ids, count):
    """Greedy tokens, whatever ends a sequence, and the least lead of a best token over the second. Every step reads the
    whole sequence again: transformers' cache has no say in the goldens."""
    ids, margin = list(ids), float("inf")
    for _ in range(count):
        best = model(torch.tensor([ids]), use_cache=False).logits[0, -1].float().topk(2)
        margin = min(margin, (best.values[0] - best.values[1]).item())
        ids.append(best.indices[0].item())
    return ids[-count:], margin


# ---- the tiny tokenizer ----

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "Hello there, how are you? I'm fine, and you're the best!",
    "A pipeline has stages; each stage holds some of the layers of the model.",
    "system user assistant",
    "你好，世界。你好吗？",
    "世界上有很多人，人们说很多语言。",
]
TEXTS = [
    "",
    "Hello, world!",
    "The stages of the pipeline, and the layers",
    "It's 2024; 12345 tokens.\n\n  def f(x):\n\treturn x  \n",
    "你好，世界 and 語言 🎉 é e\u0301",
    "<|im_start|>user\nhi<|im_end|>",
]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Qwen2's: contractions, words, digits one by one, punctuation, line ends, blanks.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def write_tokenizer(folder):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names, "chat_template": TEMPLATE, "model_max_length": 256}
    write_json(folder / "tokenizer_config.json", {**settings, "clean_up_tokenization_spaces": False})
    loaded = AutoTokenizer.from_pretrained(folder)
    texts = [{"text": t, "ids": loaded.encode(t, add_special_tokens=False)} for t in TEXTS]
    for t in texts:
        t["decoded"] = loaded.decode(t["ids"], skip_special_tokens=True)
    write_json(folder / "golden.json", {"texts": texts, "chats": chat_prompts(loaded)})


# ---- SmolLM2 ----

LONG = (
    "Here is a short text. A freight train crosses a valley every morning. It has forty wagons, most of them loaded with "
    "timber from the northern forests, and a few with grain. At the river the train slows down, because the bridge is old "
    "and the rails are worn; the driver, a patient woman named Ida, counts the wagons in her mirror as they pass the last "
    "pillar. On the far side there is a small station with a red roof, where nobody gets on and nobody gets off, but where "
    "the station master always waves. Then the train climbs through vineyards and disappears into the tunnel. "
    "Who drives the train, and what does she count?"
)
SMOLLM2_CHATS = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "system", "content": "You answer like a pirate."}, {"role": "user", "content": "Where do you live?"}],
    [{"role": "user", "content": "请用中文介绍一下北京。"}],
    [{"role": "user", "content": LONG}],
]


def write_smollm2(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompts = []
    for messages in SMOLLM2_CHATS:
        prompt = {"messages": messages, **templated(tokenizer, messages)}
        greedy, margin = decode(model, prompt["ids"], 32)
        text = tokenizer.decode(greedy, skip_special_tokens=True)
        prompts.append({**prompt, "greedy": greedy, "greedy_text": text, "margin_min": round(margin, 4)})
        print(len(prompt["ids"]), f"tokens, margin {margin:.4f}:", repr(text))
    margin = min(p["margin_min"] for p in prompts)
    if margin < MARGIN_MIN_SMOLLM2:
        raise SystemExit(f"error: a margin of {margin} is not decisive: choose other prompts")
    texts = [{"text": t, "ids": tokenizer.encode(t, add_special_tokens=False)} for t in TEXTS]
    write_json(DATA / "smollm2.json", {"margin_min": margin, "prompts": prompts, "texts": texts})


# ---- files ----


def write_f32(path, rows):
    path.write_bytes(rows.contiguous().numpy().astype("<f4").tobytes())


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, indent=1, ensure_ascii=False)
    # Lists of ids on one line.
    text = re.sub(r"\[\s*(-?\d+(?:,\s*-?\d+)*)\s*\]", lambda m: "[" + " ".join(m[1].split()) + "]", text)
    path.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
