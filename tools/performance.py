#!/usr/bin/env python3
"""Writes the table and the plots of docs/performance.md from results of `bench … --format json`.

    python3 tools/performance.py [--program target/release/pipeline-infer] [--add FILE ...] [--check]

Results are kept in docs/performance/h200.jsonl, one a workload and number of stages; --add takes newer ones of the same
id in their place, and others besides. What peers reach, and what the hardware allows, is in docs/performance/peers.json.
--check writes nothing, and ends with exit code 1 if the page is not what it would write.
"""
import argparse, json, pathlib, subprocess, sys

DOCS = pathlib.Path(__file__).resolve().parent.parent / "docs"
RESULTS, PEERS, PAGE = DOCS / "performance" / "h200.jsonl", DOCS / "performance" / "peers.json", DOCS / "performance.md"
BEGIN, END = "<!-- rows of tools/performance.py -->", "<!-- end of rows -->"
HEAD = ["workload", "tokens/s", "bubble", "of what the hardware allows", "J/token", "vLLM pipeline", "ours / it", "vLLM TP=4", "transformers"]
# File, what goes to the right and upwards, title, and which ids.
PLOTS = [
    ("batch", "requests", "output", "7b: requests at once", ["7b/1x512", "7b/64x512", "7b/256x512"]),
    ("stages", "stages", "output", "7b: one stage and four", ["7b/1x512", "7b/64x512", "7b/256x512"]),
    ("model", "weights", "output", "7b and 72b on four stages", ["/s4"]),
    ("context", "input-len", "tpot", "7b: longer contexts", ["7b/64x"]),
]


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("--program", default="target/release/pipeline-infer")
    args.add_argument("--add", nargs="+", type=pathlib.Path, default=[], metavar="FILE")
    args.add_argument("--check", action="store_true")
    args = args.parse_args()
    results = {}
    for path in [RESULTS, *args.add]:
        results.update({result["id"]: result for result in read(path)})
    text = with_rows(PAGE.read_text(), results, json.loads(PEERS.read_text()))
    if args.check:
        sys.exit(0 if text == PAGE.read_text() else f"{PAGE} is not what tools/performance.py would write")
    if args.add:
        RESULTS.write_text("".join(json.dumps(result) + "\n" for result in results.values()))
    PAGE.write_text(text)
    for name, x, y, title, only in PLOTS:
        plot(args.program, name, x, y, title, only, results)


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


def plot(program, name, x, y, title, only, results):
    """Where at least two points differ in what goes to the right."""
    places = {"requests": lambda r: r["workload"]["requests"], "stages": lambda r: len(r["stages"]),
              "weights": lambda r: r["weight_bytes"], "input-len": lambda r: r["workload"]["input_len"]}
    chosen = [r for r in results.values() if any(part in r["id"] for part in only)]
    if len({places[x](r) for r in chosen}) < 2:
        print(f"{name}.svg: not yet: results differ in nothing that it shows")
        return
    command = [program, "bench", "report", RESULTS, "--plot", DOCS / "performance" / f"{name}.svg", "--plot-x", x, "--plot-y", y,
               "--plot-title", title]
    for part in only:
        command += ["--only", part]
    subprocess.run([str(c) for c in command], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
