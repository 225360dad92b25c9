#!/usr/bin/env python3
"""SmolLM2's speed on this CPU in llama.cpp, in transformers and in our own program, measured in turn in the same run.

Needs torch==2.11.0 transformers==5.17.0 safetensors gguf==0.19.0 numpy llama-cpp-python==0.3.36, and the folder that
tools/smollm2.py makes.

    python3 tools/baseline.py DIR [--threads 2] [--rounds 3] [--only llama.cpp,...] [--ours "COMMAND"]

COMMAND runs our program once on given ids and prints a JSON line with `timings` (`prompt_tokens_per_s`,
`decode_tokens_per_s`). Its {dir}, {ids}, {new} and {threads} are filled in:

    --ours "target/release/pipeline-infer run --model {dir} --threads {threads} --format json
            --prompt-ids {ids} --max-tokens {new} --temperature 0 --ignore-eos"

Tokens per second, the best of all rounds and, in brackets, the median. A prompt's time is from handing it over to its
first token; decoding is greedy. Memory is the largest resident set of the process, mapped files included.
"""

import argparse
import json
import os
import pathlib
import shlex
import statistics
import subprocess
import sys
import tempfile
import time

SHORT, PROMPTS = 32, (181, 512)
REPEATS = 3  # in one process, after a warm-up
VOCAB = 49152
CONTEXT = 1024
ENGINES = ["llama.cpp f16", "transformers bf16", "transformers f32", "transformers f16"]


def main():
    repo = pathlib.Path(__file__).resolve().parent.parent
    args = argparse.ArgumentParser(description="SmolLM2's speed in other engines, and in ours.")
    args.add_argument("dir", type=pathlib.Path)
    args.add_argument("--threads", type=int, default=2)
    args.add_argument("--new", type=int, default=128, help="tokens to decode (default: 128)")
    args.add_argument("--rounds", type=int, default=3)
    args.add_argument("--only", default="", help="engines by the start of their name, separated by commas")
    args.add_argument("--ours", metavar="COMMAND")
    args.add_argument("--gguf", type=pathlib.Path, default=repo / ".cache" / "smollm2-f16.gguf", help="made if it is not there")
    args.add_argument("--one", help=argparse.SUPPRESS)
    args = args.parse_args()
    if args.one:
        one(args)
        return
    engines = [e for e in ENGINES if any(e.startswith(o) for o in args.only.split(","))]
    if "llama.cpp f16" in engines and not args.gguf.exists():
        child(args, "gguf")
    if args.ours:
        engines.insert(0, "ours")
    results = {e: [] for e in engines}
    for _ in range(args.rounds):  # in turn, so that a busy spell of the machine hits all alike
        for e in engines:
            results[e].append(ours(args) if e == "ours" else child(args, e))
    table(results)


def prompt(length):
    """Ids without special tokens; what they say does not matter for speed."""
    return [17 + i * 7919 % (VOCAB - 17) for i in range(length)]


def table(results):
    columns = [("decode", "decode")] + [(f"prompt of {n}", str(n)) for n in PROMPTS]
    print("| tokens/s | " + " | ".join(title for title, _ in columns) + " | memory, MB |")
    print("|---" * (len(columns) + 2) + "|")
    for engine, rounds in results.items():
        cells = []
        for _, key in columns:
            speeds = [s for r in rounds for s in r[key]]
            cells.append(f"{max(speeds):.0f} ({statistics.median(speeds):.0f})")
        cells.append(f"{max(r['memory'] for r in rounds) / 1e6:.0f}")
        print(f"| {engine} | " + " | ".join(cells) + " |")


# ---- processes ----


def measured(command):
    """Runs a command to its end: what it printed, and its largest resident set in bytes. This process stays small, since
    Linux counts the memory of the one that forks as the child's."""
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen(command, stdout=out)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            sys.exit(f"error: exit status {process.returncode} of {shlex.join(command)[:200]}")
        out.seek(0)
        unit = 1 if sys.platform == "darwin" else 1024
        return out.read().decode(), usage.ru_maxrss * unit


def child(args, engine):
    """An engine in a process of its own."""
    command = [sys.executable, __file__, str(args.dir), "--one", engine, "--gguf", str(args.gguf)]
    command += ["--threads", str(args.threads), "--new", str(args.new)]
    out, memory = measured(command)
    return {**json.loads(out.splitlines()[-1]), "memory": memory}


def ours(args):
    """Our program: a process for each figure, so that nothing is left from the one before."""

    def run(ids, new):
        fill = {"dir": args.dir, "ids": ",".join(map(str, ids)), "new": new, "threads": args.threads}
        out, memory = measured([part.format(**fill) for part in shlex.split(args.ours)])
        return json.loads(out.splitlines()[-1])["timings"], memory

    result, memory = {"decode": []}, []
    for _ in range(REPEATS):
        timings, peak = run(prompt(SHORT), args.new)
        result["decode"].append(timings["decode_tokens_per_s"])
        memory.append(peak)
        for n in PROMPTS:
            timings, peak = run(prompt(n), 1)
            result.setdefault(str(n), []).append(timings["prompt_tokens_per_s"])
            memory.append(peak)
    return {**result, "memory": max(memory)}


def one(args):
    if args.one == "gguf":
        write_gguf(args.dir, args.gguf)
        result = {}
    else:
        name, _, dtype = args.one.partition(" ")
        start = llama_cpp if name == "llama.cpp" else transformers
        result = speeds(start(args, dtype), args.new)
    print(json.dumps(result))


def speeds(begin, new):
    """`begin()` gives a fresh sequence: a function that takes ids and returns the greedy next one."""
    begin()(prompt(SHORT))
    result = {"decode": []}
    for _ in range(REPEATS):
        step = begin()
        token = step(prompt(SHORT))
        start = time.perf_counter()
        for _ in range(new - 1):
            token = step([token])
        result["decode"].append((new - 1) / (time.perf_counter() - start))
        for n in PROMPTS:
            step = begin()
            start = time.perf_counter()
            step(prompt(n))
            result.setdefault(str(n), []).append(n / (time.perf_counter() - start))
    return result


# ---- engines ----


def llama_cpp(args, _dtype):
    """The C API: the Python class around it would add time of its own."""
    import llama_cpp as c
    import numpy as np

    silent = c.llama_log_callback(lambda level, text, data: None)
    c.llama_log_set(silent, None)
    c.llama_backend_init()
    model = c.llama_model_load_from_file(str(args.gguf).encode(), c.llama_model_default_params())
    params = c.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = CONTEXT, 512, 512
    params.n_threads = params.n_threads_batch = args.threads
    context = c.llama_init_from_model(model, params)

    def step(ids):
        tokens = (c.llama_token * len(ids))(*ids)
        if c.llama_decode(context, c.llama_batch_get_one(tokens, len(ids))) != 0:
            raise SystemExit("error: llama_decode failed")
        return int(np.ctypeslib.as_array(c.llama_get_logits_ith(context, -1), (VOCAB,)).argmax())

    def begin(keep=silent):  # C holds the callback only by its address
        c.llama_memory_clear(c.llama_get_memory(context), True)
        return step

    return begin


def transformers(args, dtype):
    """A bare loop over forward passes: generate() would add time of its own."""
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_grad_enabled(False)
    torch.set_num_threads(args.threads)
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}[dtype]
    model = AutoModelForCausalLM.from_pretrained(args.dir, dtype=dtype).eval()

    def begin():
        cache = DynamicCache(config=model.config)

        def step(ids):
            out = model(torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1)
            return out.logits[0, -1].argmax().item()

        return step

    return begin


def write_gguf(folder, path):
    """The safetensors' weights as an f16 GGUF."""
    import gguf
    import numpy as np
    from safetensors.numpy import load_file

    config = json.loads((folder / "config.json").read_text())
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    w = gguf.GGUFWriter(temporary, "llama")
    w.add_context_length(config["max_position_embeddings"])
    w.add_embedding_length(config["hidden_size"])
    w.add_feed_forward_length(config["intermediate_size"])
    w.add_block_count(config["num_hidden_layers"])
    w.add_head_count(config["num_attention_heads"])
    w.add_head_count_kv(config["num_key_value_heads"])
    w.add_rope_freq_base(config["rope_theta"])
    w.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    w.add_layer_norm_rms_eps(config["rms_norm_eps"])
    w.add_vocab_size(config["vocab_size"])
    w.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    bpe = json.loads((folder / "tokenizer.json").read_text())
    special = {t["id"] for t in bpe["added_tokens"]}
    tokens = sorted(bpe["model"]["vocab"], key=bpe["model"]["vocab"].get)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("smollm")
    w.add_token_list(tokens)
    w.add_token_types([3 if i in special else 1 for i in range(len(tokens))])
    w.add_token_merges([" ".join(pair) for pair in bpe["model"]["merges"]])
    w.add_eos_token_id(config["eos_token_id"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, weight in load_file(folder / "model.safetensors").items():
        name = names.get_name(name, try_suffixes=(".weight",))
        for role, n in heads.items():
            if f".{role}." in name:  # llama.cpp's rotary wants the two halves of a head's rows interleaved
                weight = weight.reshape(n, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        w.add_tensor(name, weight.astype(np.float32 if weight.ndim == 1 else np.float16))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    os.replace(temporary, path)


if __name__ == "__main__":
    main()
