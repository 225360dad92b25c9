#!/usr/bin/env python3
"""Requests with an image each through transformers, its layers over all GPUs by device_map: what `bench throughput --images 1` of
the same model is compared with. Weights are random, of the shapes in config.json, and so are pixels and words.

    python3 tools/device_map.py MODEL [--requests 64] [--side 1036] [--words 32] [--new 1 128] [--batch 64] [--runs 2] [--cpu]

Requests go in batches of --batch at a time, as `generate` wants them. Prints a line of JSON for each number of new tokens: images and
new tokens per second, the best of --runs after a first, and each GPU's peak memory.
"""
import argparse, json, pathlib, time

import accelerate
import torch
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration


def model_of(folder, cpu):
    config = AutoConfig.from_pretrained(folder)
    config._attn_implementation = "sdpa"
    # Tables of frequencies are computed, not stored: they are made.
    with accelerate.init_empty_weights(include_buffers=False):
        model = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    if cpu:
        places = {"": "cpu"}
    else:
        # Equal shares, as device_map="auto" makes them, which has no file to read weights from here.
        memory = accelerate.utils.get_balanced_memory(model, dtype=torch.bfloat16, no_split_module_classes=model._no_split_modules)
        places = accelerate.infer_auto_device_map(model, memory, list(model._no_split_modules), torch.bfloat16)
    for name, tensor in list(model.named_parameters()):
        where = places[max((place for place in places if place == "" or name == place or name.startswith(place + ".")), key=len)]
        parent, _, leaf = name.rpartition(".")
        mean = 1.0 if tensor.dim() == 1 and "norm" in name else 0.0
        values = torch.randn(tensor.shape, dtype=tensor.dtype, device=where) * 0.02 + mean
        model.get_submodule(parent)._parameters[leaf] = torch.nn.Parameter(values, requires_grad=False)
    model.tie_weights()
    if not cpu:
        model = accelerate.dispatch_model(model, places)
    return model.eval(), config, places


def batch_of(config, count, side, words, device):
    vision = config.vision_config
    grid = side // vision.patch_size
    tokens = (grid // vision.spatial_merge_size) ** 2
    numbers = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    image = [config.vision_start_token_id] + tokens * [config.image_token_id] + [config.vision_end_token_id]
    top = min(1000, config.get_text_config().vocab_size, config.vision_start_token_id, config.image_token_id)
    ids = torch.randint(3, top, (count, words + len(image)))
    ids[:, 1 : 1 + len(image)] = torch.tensor(image)
    return dict(
        input_ids=ids.to(device),
        attention_mask=torch.ones_like(ids).to(device),
        mm_token_type_ids=(ids == config.image_token_id).int().to(device),
        pixel_values=torch.randn(count * grid * grid, numbers, dtype=torch.bfloat16).to(device),
        image_grid_thw=torch.tensor([[1, grid, grid]] * count).to(device),
    ), tokens


def measure(model, config, args, new, device):
    def run():
        for first in range(0, args.requests, args.batch):
            inputs, _ = batch_of(config, min(args.batch, args.requests - first), args.side, args.words, device)
            with torch.inference_mode():
                out = model.generate(**inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False)
            assert out.shape[1] == inputs["input_ids"].shape[1] + new
        if device != "cpu":
            torch.cuda.synchronize()

    run()
    seconds = []
    for _ in range(args.runs):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("model", type=pathlib.Path)
    args.add_argument("--requests", type=int, default=64)
    args.add_argument("--side", type=int, default=1036, help="pixels, after the resize")
    args.add_argument("--words", type=int, default=32)
    args.add_argument("--new", type=int, nargs="+", default=[1, 128])
    args.add_argument("--batch", type=int, default=64)
    args.add_argument("--runs", type=int, default=2)
    args.add_argument("--cpu", action="store_true")
    args = args.parse_args()
    torch.manual_seed(0)
    model, config, places = model_of(args.model, args.cpu)
    device = "cpu" if args.cpu else "cuda:0"
    for new in args.new:
        seconds = measure(model, config, args, new, device)
        peaks = [] if args.cpu else [torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count())]
        print(json.dumps(dict(
            requests=args.requests, side=args.side, words=args.words, new_tokens=new, batch=args.batch, seconds=round(seconds, 3),
            images_per_s=round(args.requests / seconds, 2), output_tokens_per_s=round(args.requests * new / seconds, 1),
            devices=sorted({str(place) for place in places.values()}), peak_bytes=peaks,
        )), flush=True)


if __name__ == "__main__":
    main()
