#!/usr/bin/env python3
"""A small random Qwen2.5-VL with its tokenizer, and what transformers makes of it: the goldens in tests/data/qwen2_5_vl.

Needs what reference.py and vision_reference.py need. For developers; the results are committed.

    python3 tools/vl_reference.py [SEED]                # rewrites tests/data/qwen2_5_vl, from this seed on
"""

import copy
import json
import shutil
import sys

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from transformers.utils import logging

import reference
from vision_reference import picture, upright_on_white

NAME = "qwen2_5_vl"
OUT = reference.DATA / NAME
PIXELS = {"min_pixels": 3136, "max_pixels": 30000}
SPECIAL = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
FRAMES, FPS = 4, 1.0
# Fewer of prompts with images: what follows them has been seen with texts.
SEEN_TOKENS = 8
TOKENS_PER_SECOND = 2
# Qwen2.5-VL's own.
TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IMAGE, VIDEO = {"type": "image"}, {"type": "video"}
TEXTS = [
    [{"role": "user", "content": "Hello"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "你好，世界"}],
]


def text(of):
    return {"type": "text", "text": of}


def cases():
    frames = [f"{NAME}/frames/{i}.png" for i in range(FRAMES)]
    ask = lambda *content: [{"role": "user", "content": list(content)}]
    return [
        {"messages": ask(IMAGE, text("Hello there")), "images": ["vision/large.png"]},
        {
            "messages": ask(text("The "), IMAGE, text(" and the "), IMAGE, text("?")),
            "images": ["vision/odd.png", "vision/large.png"],
        },
        {"messages": ask(VIDEO, text("How many?")), "videos": [{"frames": frames, "fps": FPS}]},
        # A conversation that goes on, with all kinds in it.
        {
            "messages": ask(IMAGE, text("one, "), VIDEO, text("two"))
            + [{"role": "assistant", "content": "Yes"}]
            + ask(text("and "), IMAGE, text("Which one?")),
            "images": ["vision/odd.png", "vision/thin.png"],
            "videos": [{"frames": frames, "fps": FPS}],
        },
    ]


def main():
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    shutil.rmtree(OUT, ignore_errors=True)
    ids = write_tokenizer()
    tokenizer = AutoTokenizer.from_pretrained(OUT)
    write_frames()
    texts = [{"messages": m, **reference.templated(tokenizer, m)} for m in TEXTS]
    seen = [prepared(case, tokenizer, ids) for case in cases()]
    for seed in range(int(sys.argv[1]) if len(sys.argv) > 1 else 1, 2000):
        wide = random_model(config(len(tokenizer), ids), seed)
        try:
            golden = attempt(wide, texts, seen, ids, tokenizer)
            break
        except Undecided as why:
            print(f"seed {seed}: {why}")
    kept_as(torch.float16, wide)
    wide.config.dtype = torch.float16
    wide.save_pretrained(OUT)
    spell_as_before(OUT / "config.json")
    reference.write_json(OUT / "golden.json", {"dtype": "float16", "seed": seed, "vocab": len(tokenizer), **golden})
    size = sum(f.stat().st_size for f in OUT.rglob("*") if f.is_file())
    print(f"{NAME}: seed {seed}, margin {golden['margin_min']}, {size / 1e3:.0f} kB", golden["native_difference_max"])


def attempt(model, texts, seen, ids, tokenizer):
    """What transformers makes of the prompts, if that is decisive."""
    wide, native = Model(model, ids), Model(kept_as(torch.float16, copy.deepcopy(model)), ids)
    more, seen_logits = wide.references(seen, SEEN_TOKENS)
    golden, logits = wide.references(texts, reference.NEW_TOKENS)
    prompts = golden + more
    native_golden, native_logits = native.references(texts, reference.NEW_TOKENS)
    native_more, native_seen = native.references(seen, SEEN_TOKENS)
    if [p["greedy"] for p in native_golden + native_more] != [p["greedy"] for p in prompts]:
        raise Undecided("other tokens in 16 bits")
    wide.check_what_matters(seen)
    difference = lambda a, b: round((a - b).abs().max().item(), 4)
    for name, rows in [("logits", logits), ("logits_native", native_logits), ("seen_logits", seen_logits), ("seen_logits_native", native_seen)]:
        reference.write_f32(OUT / f"{name}.f32", rows)
    for p in prompts:
        p["greedy_text"] = tokenizer.decode(p["greedy"], skip_special_tokens=True)
        p.pop("pixels", None)
    return {
        "margin_min": min(p["margin_min"] for p in prompts),
        "prompts": golden,
        "logits": "logits.f32",
        "logits_native": "logits_native.f32",
        "native_difference_max": difference(native_logits, logits),
        "seen": more,
        "seen_logits": "seen_logits.f32",
        "seen_logits_native": "seen_logits_native.f32",
        "seen_native_difference_max": difference(native_seen, seen_logits),
    }


# ---- the checkpoint ----


def write_tokenizer():
    OUT.mkdir(parents=True)
    tokenizer = Tokenizer.from_file(str(reference.DATA / "tokenizer" / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIAL])
    tokenizer.save(str(OUT / "tokenizer.json"))
    settings = json.loads((reference.DATA / "tokenizer" / "tokenizer_config.json").read_text())
    reference.write_json(OUT / "tokenizer_config.json", settings | {"chat_template": TEMPLATE})
    settings = {"bos_token_id": 1, "eos_token_id": [2, 0], "pad_token_id": 0, "do_sample": True, "temperature": 0.1, "top_p": 0.001}
    reference.write_json(OUT / "generation_config.json", settings | {"repetition_penalty": 1.05})
    pixels = PIXELS | {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2, "image_processor_type": "Qwen2VLImageProcessor"}
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    reference.write_json(OUT / "preprocessor_config.json", pixels | {"image_mean": mean, "image_std": std})
    return {s: tokenizer.token_to_id(s) for s in SPECIAL}


def config(vocab, ids):
    text = reference.shape(48, 60, 3, 4, 2, vocab, rms_norm_eps=1e-6, use_sliding_window=False)
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 2, 3]}, "max_position_embeddings": 512}
    text |= {"bos_token_id": 1, "eos_token_id": 2}
    vision = {"depth": 3, "hidden_size": 32, "num_heads": 2, "intermediate_size": 44, "out_hidden_size": 48, "window_size": 112}
    vision |= {"fullatt_block_indexes": [1], "tokens_per_second": TOKENS_PER_SECOND, "in_channels": 3, "patch_size": 14}
    names = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    names |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    tokens = {key: ids[name] for key, name in names.items()}
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)


def random_model(config, seed):
    """Weights of 16 bits, widened."""
    config._attn_implementation = "eager"
    model = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        weight.copy_(1 + 0.2 * noise if "norm" in name or "ln_q" in name else scale(name) * noise)
    # No model answers with pads, and transformers takes them for images.
    model.lm_head.weight[-len(SPECIAL) :] = 0
    return kept_as(torch.float32, kept_as(torch.float16, model)).eval()


def kept_as(dtype, model):
    """Its weights alone, as when they are loaded: frequencies stay wide."""
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    return model


def scale(name):
    """Tokens of images as large as those of text: a merger's last product of 128 numbers around 1 by 0.05 is around 0.5."""
    if "patch_embed" in name:
        return 0.06
    return 0.05 if "merger.mlp.2" in name else reference.scale(name)


def spell_as_before(path):
    """As the hub has it: the language model at the top."""
    config = json.loads(path.read_text())
    text, vision = config.pop("text_config"), config["vision_config"]
    rope = text.pop("rope_parameters")
    for key in ("model_type", "dtype", "layer_types", "architectures"):
        text.pop(key, None)
    config["torch_dtype"] = config.pop("dtype")
    config["vision_config"] = {k: vision[k] for k in vision if k not in ("dtype", "in_channels", "initializer_range", "rope_parameters")}
    config["vision_config"]["in_chans"] = vision["in_channels"]
    scaling = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    reference.write_json(path, config | text | {"rope_theta": rope["rope_theta"], "rope_scaling": scaling})


def write_frames():
    (OUT / "frames").mkdir()
    for i in range(FRAMES):
        Image.fromarray(picture(84, 56, 31 + i)).save(OUT / "frames" / f"{i}.png", optimize=True)


# ---- prompts ----


def prepared(case, tokenizer, ids):
    """The prompt with as many pads as there are tokens, and its pixels."""
    asked = tokenizer.apply_chat_template(case["messages"], tokenize=False, add_generation_prompt=True)
    pads = {"images": "<|image_pad|>", "videos": "<|video_pad|>"}
    grids, pixels = {"images": [], "videos": []}, {}
    if "images" in case:
        images = [upright_on_white(reference.DATA / path) for path in case["images"]]
        made = Qwen2VLImageProcessorPil(**PIXELS)(images=images, return_tensors="pt")
        pixels = {"pixel_values": made["pixel_values"], "image_grid_thw": made["image_grid_thw"]}
        grids["images"] = made["image_grid_thw"].tolist()
    if "videos" in case:
        frames = [np.asarray(Image.open(reference.DATA / path)) for path in case["videos"][0]["frames"]]
        tensor = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)
        made = Qwen2VLVideoProcessor(**PIXELS, cap_pixels_per_frame=True)(videos=[tensor], return_tensors="pt", do_sample_frames=False)
        pixels |= {"pixel_values_videos": made["pixel_values_videos"], "video_grid_thw": made["video_grid_thw"]}
        grids["videos"] = made["video_grid_thw"].tolist()
    full = []
    queues = {ids[pads[kind]]: list(of) for kind, of in grids.items()}
    for token in tokenizer.encode(asked, add_special_tokens=False):
        full += [token] * (int(np.prod(queues[token].pop(0))) // 4 if token in queues else 1)
    assert not any(queues.values()), "as many pads as images"
    return {**case, "text": asked, "ids": full, "grids": grids["images"] + grids["videos"], "pixels": pixels}


class Undecided(Exception):
    """Rounding could choose another token, or the answer only repeats itself."""


class Model:
    """transformers' model, which reads the whole sequence at every step."""

    def __init__(self, model, ids):
        self.model, self.ids = model, ids

    def positions(self, prompt, ids):
        kinds = [1 if i == self.ids["<|image_pad|>"] else 2 if i == self.ids["<|video_pad|>"] else 0 for i in ids]
        pixels = prompt.get("pixels", {})
        seconds = torch.tensor([2 / FPS]) if "video_grid_thw" in pixels else None
        grids = [pixels.get(key) for key in ("image_grid_thw", "video_grid_thw")]
        return self.model.model.get_rope_index(torch.tensor([ids]), torch.tensor([kinds]), *grids, seconds)

    def logits(self, prompt, ids, positions=None):
        positions = self.positions(prompt, ids)[0] if positions is None else positions
        return self.model(torch.tensor([ids]), position_ids=positions, use_cache=False, **prompt.get("pixels", {})).logits[0].float()

    def references(self, prompts, count):
        """Greedy tokens of every prompt, and the logits of all prompt positions, one prompt after the other."""
        golden, rows = [], []
        for prompt in prompts:
            ids, margin = list(prompt["ids"]), float("inf")
            for _ in range(count):
                best = self.logits(prompt, ids)[-1].topk(2)
                margin = min(margin, (best.values[0] - best.values[1]).item())
                ids.append(best.indices[0].item())
                if margin < reference.MARGIN_MIN:
                    raise Undecided(f"a margin of {margin:.3f} after {len(ids) - len(prompt['ids'])} tokens")
            if len(set(ids[-count:])) < 6:
                raise Undecided("it repeats itself")
            where, delta = self.positions(prompt, prompt["ids"])
            first_row = sum(len(r) for r in rows)
            rows.append(self.logits(prompt, prompt["ids"]))
            found = {"greedy": ids[-count:], "margin_min": round(margin, 4), "logits_first_row": first_row}
            if "pixels" in prompt:
                found |= {"rows": where[:, 0].T.tolist(), "delta": int(delta[0, 0])}
            golden.append({**prompt, **found})
        return golden, torch.cat(rows)

    def check_what_matters(self, prompts):
        """Without their places, or with other pixels, prompts would end in other logits."""
        for prompt in prompts:
            ids = prompt["ids"]
            last = self.logits(prompt, ids)[-1]
            plain = torch.arange(len(ids)).expand(3, 1, -1)
            other = prompt | {"pixels": {k: v.flip(0) if v.is_floating_point() else v for k, v in prompt["pixels"].items()}}
            for name, changed in [("places", self.logits(prompt, ids, plain)[-1]), ("pixels", self.logits(other, ids)[-1])]:
                off = (changed - last).abs().max().item()
                print(f"{len(ids)} tokens: other {name} change logits by {off:.2f}, of {last.abs().max().item():.1f}")
                assert off > 0.5, name


if __name__ == "__main__":
    main()
