#!/usr/bin/env python3
"""How fast a checkpoint of a large model's size comes to the GPUs, and what the stages take of their memory.

    python3 load_speed.py FOLDER [--bundle BUNDLE] [--model 7b] [--stages N ...] [--goal 20] [--times 2]

Writes a checkpoint of random bf16 weights, in shards as hubs have them, to FOLDER (15 GB for 7b, 145 for 72b; one that is there is
used again), then loads it some times for each number of stages: first by what the page cache has of it, last from the page cache,
of which files in /dev/shm are a part. Needs Python 3.9, what tools/gpu_bundle.sh has built, and what gpu_check.py needs. Fails if the
last loading is slower than the goal, in GB/s of each GPU, or a GPU has 3% more in use than its stages say.
"""
import argparse, concurrent.futures, json, os, pathlib, struct, subprocess, sys, time

import gpu_check

SHARD_BYTES = 4_000_000_000
# Numbers that all tensors are cut from.
NOISE = 64 << 20
THREADS = 8
# Of reading alone: as many readers as bring weights to four GPUs, and what each reads at a time.
READERS = min(64, os.cpu_count() or 1)
READ_BYTES = 1 << 20
READS = 256


def tensors(config):
    """Names and shapes of a Qwen2, in the order of its files."""
    dim, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads = config["num_attention_heads"]
    kv = dim // heads * config["num_key_value_heads"]
    yield "model.embed_tokens.weight", [vocab, dim]
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        yield layer + "input_layernorm.weight", [dim]
        for name, n in (("q", dim), ("k", kv), ("v", kv)):
            yield f"{layer}self_attn.{name}_proj.weight", [n, dim]
            yield f"{layer}self_attn.{name}_proj.bias", [n]
        yield layer + "self_attn.o_proj.weight", [dim, dim]
        yield layer + "post_attention_layernorm.weight", [dim]
        yield layer + "mlp.gate_proj.weight", [ffn, dim]
        yield layer + "mlp.up_proj.weight", [ffn, dim]
        yield layer + "mlp.down_proj.weight", [dim, ffn]
    yield "model.norm.weight", [dim]
    if not config.get("tie_word_embeddings"):
        yield "lm_head.weight", [vocab, dim]


def size(shape):
    n = 2
    for d in shape:
        n *= d
    return n


def shards(config):
    """Lists of tensors, each of a shard's size at most unless it is one tensor."""
    now, total = [], 0
    for name, shape in tensors(config):
        if now and total + size(shape) > SHARD_BYTES:
            yield now
            now, total = [], 0
        now.append((name, shape))
        total += size(shape)
    yield now


def noise():
    """Random bf16 numbers of some hundredths, of either sign."""
    numbers = bytearray(2 * NOISE)
    numbers[0::2] = os.urandom(NOISE)
    numbers[1::2] = os.urandom(NOISE).translate(bytes(0x3C | (b & 0x80) for b in range(256)))
    return memoryview(bytes(numbers))


def write_shard(path, entries, numbers):
    header, at = {}, 0
    for name, shape in entries:
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size(shape)]}
        at += size(shape)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb", buffering=0) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        left = at
        while left:
            left -= file.write(numbers[:min(left, len(numbers))])


def make(folder, config_path):
    config = json.loads(config_path.read_text())
    parts = list(shards(config))
    names = [f"model-{i + 1:05}-of-{len(parts):05}.safetensors" for i in range(len(parts))]
    index = folder / "model.safetensors.index.json"
    if index.exists() and (folder / "config.json").read_text() == config_path.read_text():
        print(f"{folder}: used again", flush=True)
        return [folder / name for name in names]
    folder.mkdir(parents=True, exist_ok=True)
    began, numbers = time.time(), noise()
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda part: write_shard(folder / part[0], part[1], numbers), zip(names, parts)))
    (folder / "config.json").write_text(config_path.read_text())
    total = sum(size(shape) for part in parts for _, shape in part)
    places = {name: file for file, part in zip(names, parts) for name, _ in part}
    index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": places}))
    print(f"{folder}: {total / 1e9:.1f} GB in {len(parts)} files, written in {time.time() - began:.0f} s", flush=True)
    return [folder / name for name in names]


def read(job):
    buffer, done = bytearray(READ_BYTES), 0
    with open(job[0], "rb", buffering=0) as file:
        file.seek(job[1])
        for _ in range(READS):
            done += file.readinto(buffer)
    return done


def read_speed(files):
    """GB/s of reading the files by several processes, and nothing else: what loading cannot exceed."""
    jobs = [(path, at) for path in files for at in range(0, path.stat().st_size, READS * READ_BYTES)]
    with concurrent.futures.ProcessPoolExecutor(READERS) as pool:
        list(pool.map(read, jobs[:READERS]))
        began = time.time()
        return sum(pool.map(read, jobs)) / 1e9 / (time.time() - began)


def load(args, stages, env):
    command = [args.bundle / "bin" / "pipeline-infer", "bench", "throughput", "--model", args.folder, "--stages", stages,
               "--requests", 1, "--input-len", 8, "--output-len", 1, "--warmup", 0, "--repeat", 1, "--format", "json"]
    run = subprocess.run([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env,
                         timeout=300)
    if run.returncode:
        sys.exit(f"exit code {run.returncode}: {run.stderr.strip()}")
    return json.loads(run.stdout)


def memory(figures):
    """What is said of each GPU, and whether its stages account for it."""
    by_device, ok = {}, True
    for stage in figures["stages"]:
        by_device.setdefault(stage["device"], []).append(stage)
    for device, stages in by_device.items():
        total = lambda field: sum(stage[field] or 0 for stage in stages)
        peak = stages[0]["device_bytes_peak"]
        told = total("weight_bytes") + total("kv_bytes") + total("buffer_bytes")
        over = f"{peak / 1e6:,.0f} MB in use, {100 * (peak / told - 1):+.2f}%" if peak else "not counted"
        print(f"  {device}: weights {total('weight_bytes') / 1e6:,.0f} + KV {total('kv_bytes') / 1e6:,.0f} + buffers "
              f"{total('buffer_bytes') / 1e6:,.0f} MB; {over}", flush=True)
        ok &= not peak or peak <= 1.03 * told
    return ok


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("folder", type=pathlib.Path)
    args.add_argument("--bundle", type=pathlib.Path, default=gpu_check.HERE)
    args.add_argument("--model", default="7b", help="a folder of the bundle's models, a Qwen2")
    args.add_argument("--stages", type=int, nargs="+", default=[max(1, len(gpu_check.gpus()))])
    args.add_argument("--goal", type=float, default=20.0)
    args.add_argument("--times", type=int, default=2)
    args = args.parse_args()
    files = make(args.folder, args.bundle / "models" / args.model / "config.json")
    env = {**os.environ, "LD_LIBRARY_PATH": ":".join(gpu_check.libraries())}
    ok = True
    for stages in args.stages:
        for i in range(args.times):
            figures = load(args, stages, env)
            rate, devices = figures["load_gb_per_s"] or 0.0, len({s["device"] for s in figures["stages"]})
            print(f"{stages} stages, loading {i + 1}: {figures['load_seconds']:.2f} s in all; "
                  f"{figures['weight_bytes'] / 1e9:.2f} GB of weights at {rate:.1f} GB/s, {rate / devices:.1f} a GPU", flush=True)
        ok &= memory(figures) and rate / devices >= args.goal
    print(f"reading alone, {READERS} processes: {read_speed(files):.1f} GB/s")
    sys.exit(not ok)


if __name__ == "__main__":
    main()
