#!/usr/bin/env python3
"""Small images, a small vision tower, and what Pillow and transformers make of them: tests/data/vision and vision-tower.

Needs torch==2.11.0 torchvision==0.26.0 transformers==5.17.0 pillow==13.0.0 numpy. For developers; the results are committed.

    python3 tools/vision_reference.py             # rewrites both folders

What the files hold: tests/data/README.md.
"""

import json
import pathlib
import struct
import zlib

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors.torch import save_file
from transformers import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel, Qwen2_5_VLModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids, get_vision_window_index

TOWER = pathlib.Path(__file__).resolve().parent.parent / "tests" / "data" / "vision-tower"
OUT = pathlib.Path(__file__).resolve().parent.parent / "tests" / "data" / "vision"
MIN, MAX = 3136, 12845056
IMAGE, VIDEO, TEXT = 1000, 1001, 7


def picture(width, height, seed, channels=3):
    """Slopes, edges and some noise: what a filter rings at, and a decoder has to round."""
    rng = np.random.RandomState(seed)
    y, x = np.mgrid[0:height, 0:width]
    planes = []
    for c in range(channels):
        plane = 255 * (x * (c + 1) % max(width, 2) / max(width, 2) + y / height) / 2
        for _ in range(4):
            left, top = rng.randint(0, width), rng.randint(0, height)
            plane[top : top + height // 3, left : left + width // 3] = rng.choice([0, 255, rng.randint(256)])
        planes.append(plane)
    image = np.stack(planes, -1)
    image[::5] += rng.randint(-20, 21, image[::5].shape)
    return image.clip(0, 255).astype(np.uint8)


def png(path, width, height, bits, color, data):
    """A PNG of 16 bits, which Pillow does not write, or one that claims to be larger than it is."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(data, 9)) + chunk(b"IEND", b""))


def png16(path, array, color):
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    png(path, array.shape[1], array.shape[0], 16, color, rows)


def write_sources():
    """File names, each with the bounds of pixels it is resized within."""

    def make(w, h, seed, mode="RGB"):
        planes = picture(w, h, seed, len(mode))
        return Image.fromarray(planes[..., 0] if mode == "L" else planes, mode)

    deep = lambda w, h, c, seed: np.random.RandomState(seed).randint(0, 65536, (h, w, c))
    make(91, 67, 0).save(OUT / "odd.png")
    make(60, 45, 1, "RGBA").save(OUT / "alpha.png")
    make(41, 50, 2, "L").save(OUT / "grey.png")
    make(33, 52, 3, "LA").save(OUT / "grey-alpha.png")
    png16(OUT / "rgb16.png", deep(31, 37, 3, 4), 2)
    png16(OUT / "grey16.png", deep(37, 31, 1, 5), 0)
    palette = make(70, 61, 6).quantize(17)
    palette.save(OUT / "palette.png", transparency=3)
    palette.save(OUT / "frames.gif", save_all=True, append_images=[make(70, 61, 7).quantize(9)], transparency=2)
    exif = Image.Exif()
    exif[0x112] = 6
    make(71, 50, 8).save(OUT / "turned.jpg", quality=90, exif=exif)
    make(64, 80, 9).save(OUT / "progressive.jpg", quality=85, progressive=True, subsampling=0)
    make(50, 50, 10, "L").save(OUT / "grey.jpg", quality=90)
    make(48, 56, 11, "CMYK").save(OUT / "cmyk.jpg", quality=90)
    make(45, 64, 12, "RGBA").save(OUT / "lossless.webp", lossless=True, exact=True)
    make(64, 45, 13).save(OUT / "lossy.webp", quality=90)
    make(44, 30, 14).save(OUT / "rgb.bmp")
    palette.save(OUT / "palette.bmp")
    palette.save(OUT / "palette.tiff", compression="tiff_lzw")
    make(43, 59, 15).save(OUT / "lzw.tiff", compression="tiff_lzw")
    Image.fromarray(deep(30, 40, 1, 16).squeeze().astype(np.uint16)).save(OUT / "grey16.tiff")
    make(1, 1, 17).save(OUT / "one.png")
    make(5, 3, 18).save(OUT / "tiny.png")
    smooth = make(60, 40, 19).resize((613, 407), Image.Resampling.NEAREST).quantize(64)
    smooth.save(OUT / "large.png", optimize=True)
    make(300, 4, 20).save(OUT / "thin.png")
    names = sorted(p.name for p in OUT.iterdir() if p.is_file())
    cases = [(name, MIN, MAX) for name in names]
    return cases + [("large.png", 784, 9000), ("large.png", 784, 30000), ("odd.png", 9000, MAX), ("odd.png", 784, 1600)]


def upright_on_white(path):
    image = Image.open(path)
    if image.mode.startswith("I;16"):  # Pillow itself would cut off all above 255
        return Image.fromarray((np.array(image) >> 8).astype(np.uint8)).convert("RGB")
    image = ImageOps.exif_transpose(image)
    if image.mode in ("RGBA", "LA", "P", "PA"):
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.split()[3])
        return white
    return image.convert("RGB")


def levels(values, processor):
    """pixel_values as 8-bit levels, one row a patch."""
    mean = np.array(processor.image_mean).repeat(values.shape[1] // 3)
    std = np.array(processor.image_std).repeat(values.shape[1] // 3)
    exact = (values.numpy().astype(np.float64) * std + mean) * 255
    assert np.abs(exact - exact.round()).max() < 1e-3
    return Image.fromarray(exact.round().astype(np.uint8))


def samples(values):
    flat = values.flatten()
    return {int(i): float(flat[i]) for i in range(0, len(flat), 997)}


def images(cases):
    resized, found = OUT / "resized", []
    resized.mkdir()
    for number, (name, low, high) in enumerate(cases):
        image = upright_on_white(OUT / name)
        height, width = smart_resize(image.height, image.width, 28, low, high)
        target = f"resized/{number}.png"
        image.resize((width, height), Image.Resampling.BICUBIC).save(OUT / target, optimize=True)
        case = {"file": name, "min_pixels": low, "max_pixels": high, "size": [image.width, image.height], "resized": target}
        if name in ("odd.png", "tiny.png") and low == MIN:
            processor = Qwen2VLImageProcessorPil(min_pixels=low, max_pixels=high)
            made = processor(images=[image], return_tensors="pt")
            patches = f"resized/{number}-patches.png"
            levels(made["pixel_values"], processor).save(OUT / patches, optimize=True)
            case |= {"grid": made["image_grid_thw"][0].tolist(), "patches": patches, "samples": samples(made["pixel_values"])}
        found.append(case)
    return found


def video():
    folder = OUT / "video"
    folder.mkdir()
    frames = [picture(84, 56, seed) for seed in (21, 22, 23)]
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"{i}.png", optimize=True)
    processor = Qwen2VLVideoProcessor(min_pixels=MIN, max_pixels=MAX, cap_pixels_per_frame=True)
    tensor = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)
    made = processor(videos=[tensor], return_tensors="pt", do_sample_frames=False)
    values = made["pixel_values_videos"]
    levels(values, processor).save(folder / "patches.png", optimize=True)
    return {"grid": made["video_grid_thw"][0].tolist(), "patches": "video/patches.png", "samples": samples(values)}


def windows():
    grids = [[[1, 4, 6]], [[1, 16, 16]], [[1, 22, 32], [3, 10, 8], [1, 2, 2]], [[2, 18, 34]]]
    found = []
    for grid in grids:
        thw = torch.tensor(grid)
        index, ends = get_vision_window_index(thw, spatial_merge_size=2, window_size=112, patch_size=14)
        case = {"grids": grid, "cells": index.tolist(), "ends": ends.tolist()}
        case["frames"] = get_vision_cu_seqlens(thw).tolist()
        case["places"] = get_vision_position_ids(thw, 2).tolist()
        found.append(case)
    return found


def positions():
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 16, "tokens_per_second": 2}
    text = {"vocab_size": 1100, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 2}
    model = Qwen2_5_VLModel(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
    image = lambda *grid: ("image", list(grid), 0.0)
    film = lambda seconds, *grid: ("video", list(grid), seconds)
    prompts = [
        [5],
        [3, image(1, 8, 12), 4],
        [image(1, 4, 4), 2, image(1, 16, 4), 1, image(1, 4, 22), 6],
        [2, film(1.0, 3, 8, 4), 5],
        [2, film(1.0, 9, 4, 4), 5, image(1, 6, 8), 1],
        [2, film(2.0, 4, 6, 6), 1, film(1.5, 2, 4, 8), 3],
        [1, film(0.5, 3, 4, 4), 2],
        [4, image(1, 20, 4)],
    ]
    found = []
    for prompt in prompts:
        kinds, grids, seconds, spans = [], {"image": [], "video": []}, [], []
        for part in prompt:
            if isinstance(part, int):
                kinds += [0] * part
                spans.append({"text": part})
                continue
            kind, grid, length = part
            kinds += [1 if kind == "image" else 2] * (grid[0] * grid[1] * grid[2] // 4)
            grids[kind].append(grid)
            seconds += [length] if kind == "video" else []
            spans.append({kind: grid, "seconds": length})
        tensor = lambda kind: torch.tensor(grids[kind]) if grids[kind] else None
        rows, delta = model.get_rope_index(
            torch.tensor([kinds]), torch.tensor([kinds]), tensor("image"), tensor("video"), torch.tensor(seconds) if seconds else None
        )
        found.append({"spans": spans, "rows": rows[:, 0].T.tolist(), "delta": int(delta[0, 0])})
    return found


def hostile():
    """Files that claim more than there should be; each is refused by its header."""
    folder = OUT / "hostile"
    folder.mkdir()
    png(folder / "bomb.png", 60000, 60000, 8, 2, bytes(100))
    png(folder / "ribbon.png", 10000, 20, 1, 0, bytes(20 * 1251))
    png(folder / "zero.png", 0, 5, 8, 2, b"")
    small = Image.new("RGB", (8, 8), (200, 10, 10))
    for name in ("bomb.gif", "bomb.bmp", "bomb.jpg", "bomb.webp", "bomb.tiff"):
        small.save(folder / name)
    patch = lambda name, at, data: (folder / name).write_bytes(
        (b := (folder / name).read_bytes())[:at] + data + b[at + len(data) :]
    )
    huge = struct.pack("<HH", 65000, 65000)
    patch("bomb.gif", 6, huge)
    patch("bomb.bmp", 18, struct.pack("<ii", 60000, 60000))
    patch("bomb.jpg", (folder / "bomb.jpg").read_bytes().index(b"\xff\xc0") + 5, huge)
    patch("bomb.webp", 26, struct.pack("<HH", 16000, 16000))
    tiff = (folder / "bomb.tiff").read_bytes()
    first = struct.unpack("<I", tiff[4:8])[0]
    for i in range(struct.unpack("<H", tiff[first : first + 2])[0]):
        entry = first + 2 + 12 * i
        tag, kind = struct.unpack("<HH", tiff[entry : entry + 4])
        if tag in (256, 257, 278):  # width, height, rows in a strip
            patch("bomb.tiff", entry + 2, struct.pack("<HII", 4, 1, 60000))


def tower():
    """A random tower in f16, and its tokens in f32 for patches that a formula makes."""
    shape = {"depth": 3, "hidden_size": 32, "num_heads": 2, "intermediate_size": 44, "out_hidden_size": 24, "window_size": 112}
    vision = shape | {"fullatt_block_indexes": [1], "tokens_per_second": 2, "hidden_act": "silu", "in_chans": 3}
    vision |= {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
    config = Qwen2_5_VLConfig(vision_config=vision).vision_config
    config._attn_implementation = "eager"
    model = Qwen2_5_VisionTransformerPretrainedModel(config).eval()
    generator, tensors = torch.Generator().manual_seed(3), {}
    for name, tensor in model.state_dict().items():
        spread = 0.1 if "norm" in name or "ln_q" in name else 0.06 if "patch_embed" in name else 0.25
        values = torch.randn(tensor.shape, generator=generator) * spread + (1 if spread == 0.1 else 0)
        tensors["visual." + name] = values.half()
        tensor.copy_(values.half().float())
    save_file(tensors, TOWER / "model.safetensors")
    grids = [[1, 10, 18], [1, 4, 6], [2, 6, 10], [1, 2, 2]]
    thw = torch.tensor(grids)
    i = np.arange(int(thw.prod(1).sum()) * 1176)
    patches = torch.from_numpy((i * 7919 % 1009).astype(np.float32) / np.float32(1009) * 4 - 2).view(-1, 1176)
    with torch.no_grad():
        tokens = model(patches, thw).pooler_output
        model = model.double()
        exact = model(patches.double(), thw).pooler_output
    (TOWER / "config.json").write_text(json.dumps({"vision_config": vision}) + "\n")
    (TOWER / "tokens.f32").write_bytes(tokens.numpy().astype("<f4").tobytes())
    golden = {"grids": grids, "tokens": "tokens.f32", "largest": float(tokens.abs().max())}
    golden |= {"largest_difference_to_f64": float((tokens - exact).abs().max())}
    (TOWER / "tower.json").write_text(json.dumps(golden) + "\n")


def empty(folder):
    if folder.exists():
        for path in sorted(folder.rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
    folder.mkdir(parents=True, exist_ok=True)


def main():
    empty(OUT)
    empty(TOWER)
    tower()
    golden = {"images": images(write_sources()), "video": video(), "windows": windows(), "positions": positions()}
    hostile()
    lines = [f'"{key}": ' + json.dumps(value, separators=(",", ":")) for key, value in golden.items()]
    (OUT / "golden.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
