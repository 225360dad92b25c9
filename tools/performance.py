#!/usr/bin/env python3
"""Writes the table and the plots of docs/performance.md from results of `bench … --format json`.

    python3 tools/performance.py [--program target/release/pipeline-infer] [--add FILE ...] [--check]
    python3 tools/performance.py --commands MODELS [--program PROGRAM] | sh > results.json

Results are kept in docs/performance/h200.jsonl, one a workload and number of stages; --add takes newer ones of the same
id in their place, and others besides. What peers reach, and what the hardware allows, is in docs/performance/peers.json.
--check writes nothing, and ends with exit code 1 if the page is not what it would write. --commands prints what to run on the
machine with the GPUs for all rows and plots, where MODELS has a folder for each size, as those of gpu_bundle.sh.
"""
import argparse, json, pathlib, subprocess, sys

DOCS = pathlib.Path(__file__).resolve().parent.parent / "docs"
RESULTS, PEERS, PAGE = DOCS / "performance" / "h200.jsonl", DOCS / "performance" / "peers.json", DOCS / "performance.md"
BEGIN, END = "<!-- rows of tools/performance.py -->", "<!-- end of rows -->"
HEAD = ["workload", "tokens/s", "bubble", "of what the hardware allows", "J/token", "vLLM pipeline", "ours / it", "vLLM TP=4", "transformers"]
# File, what goes to the right and upwards, title, what it is called in the page, and which ids.
PLOTS = [
    ("batch", "requests", "output", "7b: requests at once", "output tokens a second against requests at once",
     [f"7b/{n}x512x256/s{stages}" for stages in (1, 4) for n in (1, 16, 64, 128, 256, 512)]),
    ("stages", "stages", "output", "7b: stages", "output tokens a second against stages",
     [f"7b/{work}/s{stages}" for work in ("1x512x128", "64x512x256", "256x512x256") for stages in (1, 2, 4)]),
    ("model", "weights", "output", "Sizes of Qwen2.5", "output tokens a second against the size of the weights",
     [f"{model}/{work}/s{stages}" for stages, models in ((1, ("0.5b", "1.5b", "3b", "7b", "14b", "32b")), (4, ("7b", "32b", "72b")))
      for model in models for work in ("1x512x64", "64x512x128", "256x512x128")]),
    ("context", "input-len", "tpot", "7b: longer contexts", "time per token against the prompt's length",
     [f"7b/64x{n}x128/s{stages}" for stages in (1, 4) for n in (512, 2048, 4096, 8192)]),
]


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--program", default="target/release/pipeline-infer")
    args.add_argument("--add", nargs="+", type=pathlib.Path, default=[], metavar="FILE")
    args.add_argument("--check", action="store_true")
    args.add_argument("--commands", type=pathlib.Path, metavar="MODELS")
    args = args.parse_args()
    if args.commands:
        print("\n".join(commands(args.program, args.commands)))
        return
    results = {}
    for path in [RESULTS, *args.add]:
        results.update({result["id"]: result for result in read(path)})
    text = with_rows(PAGE.read_text(), results, json.loads(PEERS.read_text()))
    drawn = [plot for plot in PLOTS if differ(plot, results)]
    for plot in PLOTS:
        text = with_image(text, plot, plot in drawn)
    if args.check:
        sys.exit(0 if text == PAGE.read_text() else f"{PAGE} is not what tools/performance.py would write")
    if args.add:
        RESULTS.write_text("".join(json.dumps(result) + "\n" for result in results.values()))
    PAGE.write_text(text)
    for plot in drawn:
        draw(args.program, plot)


def commands(program, models):
    """Small ones first, each workload once."""
    ids = [peer["id"] for peer in json.loads(PEERS.read_text())] + [each for plot in PLOTS for each in plot[5]]
    for each in sorted(set(ids), key=lambda each: (each.startswith("72b"), each)):
        model, work, stages = each.split("/")
        requests, given, new = work.split("x")
        yield (f"{program} bench throughput --model {models / model} --weights dummy --stages {stages[1:]} --requests {requests} "
               f"--input-len {given} --output-len {new} --repeat 3 --format json")


def read(path):
    """Those that have figures: a sweep also tells what it has left out."""
    found = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return [result for result in found if "id" in result and "output_tokens_per_s" in result]


def with_rows(page, results, peers):
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    lines = ["| " + " | ".join(HEAD) + " |", "|---|" + "---:|" * (len(HEAD) - 1)]
    lines += ["| " + " | ".join(row(peer, results.get(peer["id"]))) + " |" for peer in peers]
    return f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{after}"


def row(peer, result):
    """A cell that nobody has measured is empty."""
    ours = rate(peer, result) if result else None
    steady = ((result or {}).get("pipeline") or {}).get("steady") or {}
    bubble, energy = steady.get("bubble"), (result or {}).get("energy") or {}
    share = ours / peer["allows"] if ours and "allows" in peer else None
    ratio = ours / peer["vllm_pp"] if ours and "vllm_pp" in peer else None
    prompt = peer.get("prompt")
    joules = energy.get("joules_per_token" if prompt else "joules_per_output_token")
    return [f"`{peer['id']}`" + (", prompt tokens" if prompt else ""), number(ours), percent(bubble, 1), percent(share, 0),
            "" if joules is None else f"{joules:.2f}", number(peer.get("vllm_pp")), "" if ratio is None else f"{ratio:.2f}",
            number(peer.get("vllm_tp")), number(peer.get("transformers"))]


def rate(peer, result):
    kind = "prompt_tokens_per_s" if peer.get("prompt") else "output_tokens_per_s"
    return (result.get(kind) or {}).get("median")


def number(value):
    return "" if value is None else f"{value:,.{1 if value < 1000 else 0}f}".removesuffix(".0")


def percent(share, digits):
    # Of sampled passes an idle share may come out a little below nothing.
    return "" if share is None else f"{100 * max(share, 0):.{digits}f}%"


def with_image(page, plot, drawn):
    name, _, _, _, alt, _ = plot
    begin, end = f"<!-- plot {name} -->", "<!-- end of plot -->"
    before, rest = page.split(begin)
    _, after = rest.split(end, 1)
    image = f"![{alt}](performance/{name}.svg)" if drawn else "*Not measured yet.*"
    return f"{before}{begin}\n{image}\n{end}{after}"


def differ(plot, results):
    """Whether two workloads of one line differ in what goes to the right."""
    _, x, _, _, _, ids = plot
    places = {"requests": lambda r: r["workload"]["requests"], "stages": lambda r: len(r["stages"]),
              "weights": lambda r: r["weight_bytes"], "input-len": lambda r: r["workload"]["input_len"]}
    return len({places[x](results[each]) for each in ids if each in results}) > 1


def draw(program, plot):
    name, x, y, title, _, ids = plot
    command = [program, "bench", "report", RESULTS, "--plot", DOCS / "performance" / f"{name}.svg", "--plot-x", x, "--plot-y", y,
               "--plot-title", title]
    for each in ids:
        command += ["--only", each]
    subprocess.run([str(c) for c in command], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
