#!/usr/bin/env bash
# Builds what a machine with GPUs and without Rust needs to check this tree, into one folder, and an archive of it to be carried there:
#
#     tools/gpu_bundle.sh [FOLDER]        # .gpu by default, and .gpu.tar.xz
#     python3 FOLDER/gpu_check.py         # there
#     python3 FOLDER/load_speed.py /tmp/7b
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-.gpu}

# libtest's executables have a hash in their names: cargo says which they are.
tests=$(cargo test --release --locked --no-run --lib --test gpu --test gpu_model --message-format=json |
	python3 -c '
import json, sys
for line in sys.stdin:
    message = json.loads(line)
    if message.get("executable") and message["profile"]["test"]:
        print("lib" if "lib" in message["target"]["kind"] else message["target"]["name"], message["executable"])')
cargo build --release --locked

rm -rf "$out"
mkdir -p "$out/bin" "$out/tests" "$out/models"
cp target/release/pipeline-infer "$out/bin/"
while read -r name path; do cp "$path" "$out/bin/$name"; done <<<"$tests"
cp -r tests/data "$out/tests/"
cp tools/gpu_check.py tools/load_speed.py "$out/"
python3 - "$out/models" <<'PYTHON'
import json, pathlib, sys

# Qwen2.5's language models by their shapes, those of Qwen2.5-VL among them, and one with its tower.
SHAPES = {
    "0.5b": dict(hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2, intermediate_size=4864,
                 tie_word_embeddings=True),
    "1.5b": dict(hidden_size=1536, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2, intermediate_size=8960,
                 tie_word_embeddings=True),
    "3b": dict(hidden_size=2048, num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2, intermediate_size=11008,
               tie_word_embeddings=True),
    "7b": dict(hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, intermediate_size=18944),
    "14b": dict(hidden_size=5120, num_hidden_layers=48, num_attention_heads=40, num_key_value_heads=8, intermediate_size=13824),
    "32b": dict(hidden_size=5120, num_hidden_layers=64, num_attention_heads=40, num_key_value_heads=8, intermediate_size=27648),
    "72b": dict(hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8, intermediate_size=29568),
}
SHAPES["vl7b"] = SHAPES["7b"]
TOWER = dict(depth=32, hidden_act="silu", hidden_size=1280, num_heads=16, intermediate_size=3420, out_hidden_size=3584,
             window_size=112, fullatt_block_indexes=[7, 15, 23, 31], patch_size=14, spatial_patch_size=14, spatial_merge_size=2,
             temporal_patch_size=2, tokens_per_second=2, in_chans=3)
# With these bounds 1024x1024 pixels become 1036x1036: 1,369 tokens.
PIXELS = dict(min_pixels=3136, max_pixels=12845056, patch_size=14, temporal_patch_size=2, merge_size=2, resample=3)
for name, shape in SHAPES.items():
    config = dict(architectures=["Qwen2ForCausalLM"], model_type="qwen2", hidden_act="silu", dtype="bfloat16", vocab_size=152064,
                  max_position_embeddings=32768, rms_norm_eps=1e-6, tie_word_embeddings=False, use_sliding_window=False,
                  bos_token_id=151643, eos_token_id=151645, rope_parameters=dict(rope_type="default", rope_theta=1000000.0))
    if name.startswith("vl"):
        config |= dict(architectures=["Qwen2_5_VLForConditionalGeneration"], model_type="qwen2_5_vl", vision_config=TOWER,
                       max_position_embeddings=128000, image_token_id=151655, video_token_id=151656,
                       vision_start_token_id=151652, vision_end_token_id=151653,
                       rope_parameters=dict(rope_type="default", rope_theta=1000000.0, mrope_section=[16, 24, 24]))
    folder = pathlib.Path(sys.argv[1]) / name
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | shape, indent=1) + "\n")
    if name.startswith("vl"):
        (folder / "preprocessor_config.json").write_text(json.dumps(PIXELS) + "\n")
PYTHON

strip "$out"/bin/* 2>/dev/null || true
tar -C "$out" -cJf "$out.tar.xz" .
echo "$out: $(du -sm "$out" | cut -f1) MiB, and $(du -sm "$out.tar.xz" | cut -f1) MiB as $out.tar.xz"
