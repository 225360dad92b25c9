#!/usr/bin/env python3
"""Runs on a machine with GPUs what tools/gpu_bundle.sh has built elsewhere, and prints a table of outcomes last.

    python3 gpu_check.py [BUNDLE] [--only NAME ...] [--skip NAME ...] [--logs DIR] [--filter TEST]

Needs Python 3.9, a driver, NVRTC and cublasLt (a toolkit's, or those of Python's nvidia packages), and for two of the checks
compute-sanitizer. No Rust. The checks:

    ops        every op on the GPU against the processor's (tests/gpu.rs)
    models     small checkpoints, stages, batches, sampling, faults (tests/gpu_model.rs)
    faults     stages on GPUs that fail are built anew, with the same tokens in no more memory; a tower takes what was said (the
               library's own tests)
    memcheck   the op suite over fewer shapes under compute-sanitizer: no access out of bounds
    racecheck  the same: no race in shared memory, as far as the kernels are the project's own
    7b-…       tokens per second of random weights, with the goal for as many GPUs
    …-one      four GPUs: the same on one of them, which what four reach is compared with
    …-simulated  the bubble that `bench simulate` gives for what the run's passes cost, beside the measured one
    …-hand, …-even  the same with layers cut by hand and into equal numbers, beside the planned cut
    load       GB/s of loading a checkpoint of 7b's size from the page cache, and each GPU's memory (load_speed.py)
    attention  decode attention by itself (the ignored tests of tests/gpu.rs): its share of a copy's bytes per second
    tower      the 7b's vision tower, whole and op by op: images per second, and its share of a large product's rate
    images-…   64 requests with an image of 1024x1024 to 7b with its tower, prepared before: images per second, each GPU's memory;
               four GPUs: beside one of them, and beside a tower that is all on the first (-first)
    late       four GPUs: what a prompt of 8,192 tokens does to the time between tokens of 128 others
    prefix-…   four GPUs: time to the first token of 64 requests that begin with the same 2,048 tokens, without and with reuse
    relayout   four GPUs: how long 64 requests that run wait when a layer of 7b moves, and whether their tokens change
    boundary-… time per token of one request to 7b with so many stages: what a boundary adds to one stage's
"""
import argparse, concurrent.futures, json, os, pathlib, re, shutil, signal, subprocess, sys, sysconfig, tempfile, time

HERE = pathlib.Path(__file__).resolve().parent
# Tests that would take the sanitizers minutes, and show nothing there that others do not.
NOT_SANITIZED = ["a_large_head", "a_long_context", "many_draws", "the_batch_does_not_matter", "heads_of_12", "heads_of_96",
                 "has_the_same_bits", "a_row_does_not_see"]
# Model, requests, prompt tokens, new tokens, what is measured, and its goal for a number of H200s, in tokens per second.
BENCHES = [
    ("7b", 1, 512, 128, "output", {1: 240, 4: 230}),
    ("7b", 64, 512, 256, "output", {1: 7826, 4: 7837}),
    ("7b", 256, 512, 256, "output", {1: 12277, 4: 13203}),
    ("7b", 32, 4096, 1, "prompt", {1: 41000, 4: 115907}),
    ("72b", 1, 512, 64, "output", {4: 26}),
    ("72b", 64, 512, 128, "output", {4: 822}),
    ("72b", 256, 512, 128, "output", {4: 1808}),
    ("72b", 32, 4096, 1, "prompt", {4: 12047}),
]

# Idle share of the slowest of several stages, at most, where so many requests decode.
BUBBLE_GOAL, BUBBLE_REQUESTS = 0.03, 256
# What the simulator's bubble may be off by, of what the same costs were measured with.
SIMULATED_GOAL = 0.02
# Four stages' rate over one's in the same run, at least.
RATIO_GOALS = {"7b-256x512x256": 2.15, "7b-32x4096x1": 3.6}
# Of four stages, the best cut by hand, and what the planned one may lose against others.
HAND = {"7b-256x512x256": "0-7@cuda:0,8-14@cuda:1,15-21@cuda:2,22-27@cuda:3"}
PLANNED_GOAL = 0.98
# Bytes of disk that the checkpoint for `load` needs.
LOAD_DISK = 17 << 30
# Between others' tokens while a long prompt is worked on, the longest time in medians, at most.
LATE_GOAL = 2.0
# Milliseconds that requests wait when a layer moves, at most.
RELAYOUT_GOAL = 300.0
# Time to first token without reuse of a shared prefix over that with it, at least.
PREFIX_GOAL = 5.0
# Kernels of cublasLt: they synchronise by means that racecheck does not know.
NOT_OURS = ("nvjet", "cutlass", "sm80_xmma", "sm90_xmma", "ampere_")
# Of a copy's rate, what decode attention should reach at least.
ATTENTION_GOAL = 0.80
# Of a large product's rate, what the vision tower should reach at least with one image of 1024x1024.
TOWER_GOAL = 0.50
# Requests with an image each, and their prompt tokens beside it; by their new tokens, images per second of four GPUs over those of
# one, at least, and over those of four where the whole tower is on the first.
IMAGES = (64, 64)
IMAGE_GOALS = {1: (3.5, 1.15), 128: (2.4, None)}
# What a GPU may have in use of what its stages say.
MEMORY_GOAL = 1.03
# Microseconds from the last layer to tokens that the parts of a split head take beside the stages.
GATHERING_US = 120
# Stages whose time per token is compared with one stage's, and microseconds that each boundary may add to it.
BOUNDARY_STAGES, BOUNDARY_GOAL = (1, 2, 4), 15.0


class Check:
    """A program to run, with a time limit; `judge` makes an outcome of how it ended."""

    def __init__(self, name, command, limit, env=None, judge=None, log=None):
        # Of a bench that fails or hangs it should be known how far it came.
        told = {"RUST_LOG": "info"} if log == "benches" else {}
        self.name, self.command, self.limit, self.env, self.judge = name, command, limit, env or told, judge or judge_tests
        self.log_name = log or name
        self.outcome, self.seconds, self.failed = "", 0.0, False

    def start(self, logs, env):
        self.log = logs / f"{self.log_name}.log"
        self.began = time.time()
        with open(self.log, "a") as log:
            self.log_start = log.tell()
            self.process = subprocess.Popen([str(c) for c in self.command], stdout=log, stderr=subprocess.STDOUT,
                                            env={**env, **self.env}, start_new_session=True)

    def finish(self):
        try:
            code = self.process.wait(max(1.0, self.began + self.limit - time.time()))
        except subprocess.TimeoutExpired:
            with open(self.log, "a") as log:
                log.write(what_it_does(self.process.pid))
            os.killpg(self.process.pid, signal.SIGKILL)  # a sanitizer's child too
            self.process.wait()
            code = None
        self.seconds = time.time() - self.began
        text = self.text()
        self.outcome, ok = self.judge(code, text)
        if code is None:
            self.outcome, ok = f"not done after {self.limit} s; {self.outcome}", False
        self.failed = not ok
        if self.failed:
            show_failure(self, text)

    def text(self):
        return self.log.read_bytes()[self.log_start:].decode(errors="replace")


def what_it_does(pid):
    """The threads of a process that has not ended in time, what its GPUs do, and, where there is a debugger, their kernels."""
    told = [f"--- process {pid} has not ended: its threads with their state and processor time"]
    for task in sorted(pathlib.Path(f"/proc/{pid}/task").glob("*")):
        try:
            name, fields = (task / "comm").read_text().strip(), (task / "stat").read_text().rpartition(")")[2].split()
            told.append(f"{name}: {fields[0]} {(int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK'):.1f} s")
        except OSError:
            pass  # it has just ended
    asked = [["nvidia-smi", "--query-gpu=index,utilization.gpu,power.draw,memory.used", "--format=csv"]]
    debugger = shutil.which("cuda-gdb") or "/usr/local/cuda/bin/cuda-gdb"
    if pathlib.Path(debugger).exists():
        asked.append([debugger, "-p", str(pid), "-batch", "-ex", "info cuda kernels", "-ex", "thread apply all bt 12"])
    for command in asked:
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=30)
            told.append(done.stdout[-6000:] + done.stderr[-500:])
        except (OSError, subprocess.TimeoutExpired) as error:
            told.append(f"{command[0]}: {error}")
    return "\n".join(told) + "\n"


def judge_tests(code, text):
    """Of libtest's output, perhaps under compute-sanitizer."""
    summary = re.search(r"^test result: .*? (\d+) passed; (\d+) failed", text, re.M)
    counted = lambda how: len(re.findall(rf"\.\.\. {how}$", text, re.M))
    passed, failed = map(int, summary.groups()) if summary else (counted("ok"), counted("FAILED"))
    errors = re.search(r"ERROR SUMMARY: (\d+) error", text) or re.search(r"RACECHECK SUMMARY: (\d+) hazard", text)
    parts = [f"{passed} passed"] + [f"{failed} failed"] * (failed > 0)
    if errors and errors[1] != "0":
        parts.append(f"{errors[1]} errors found")
    if code not in (0, 101, None):
        parts.append(f"exit code {code}")
    return ", ".join(parts), code == 0 and passed > 0 and (not errors or errors[1] == "0")


def judge_memory(code, text):
    """The same under memcheck, which must have come to its end."""
    shown, ok = judge_tests(code, text)
    if not re.search(r"ERROR SUMMARY: \d+ error", text):
        return f"{shown}, no summary of the sanitizer's", False
    return shown, ok


def judge_races(code, text):
    """The same under racecheck, for the project's own kernels. What cannot be read counts as theirs nowhere."""
    summary = re.search(r"RACECHECK SUMMARY: (\d+) hazard", text)
    records = [re.findall(r"access at (\S.*?)\+0x", record) for record in text.split("Race reported between")[1:]]
    unread = max(0, int(summary[1]) - len(records) if summary else 0) + sum(len(names) < 2 for names in records)
    read = [names for names in records if len(names) >= 2]
    ours = [names for names in read if not all(name.startswith(NOT_OURS) for name in names)]
    shown, _ = judge_tests(0, re.sub(r"RACECHECK SUMMARY: \d+", f"RACECHECK SUMMARY: {len(ours)}", text))
    shown += f", {len(read) - len(ours)} in cublasLt's own kernels" * (len(read) > len(ours))
    shown += f", {unread} hazards that could not be read" * (unread > 0)
    shown += ", no summary of the sanitizer's" * (not summary)
    # The sanitizer's code is for hazards alone where there are some.
    ended = code == 0 or (code == 9 and len(records) > 0)
    passed = re.search(r"^test result: ok", text, re.M)
    return shown, bool(passed and summary) and not ours and not unread and ended


def json_of(text):
    """The object that a bench has printed, if it has."""
    lines = [line for line in text.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if lines else None


def last_line(code, text):
    return text.strip().splitlines()[-1][:160] if text.strip() else f"exit code {code}"


class Bench:
    """A workload on the bundle's model with random weights, and what its runs came to."""

    def __init__(self, bundle, logs, model, requests, given, new, measured):
        self.name, self.logs, self.measured, self.requests = f"{model}-{requests}x{given}x{new}", logs, measured, requests
        self.program = [bundle / "bin" / "pipeline-infer", "bench"]
        self.model = ["--model", bundle / "models" / model, "--weights", "dummy"]
        self.work = ["--requests", requests, "--input-len", given, "--output-len", new, "--format", "json"]
        self.rates = {}  # By what is appended to the name: tokens per second.

    def check(self, flags, judge, suffix=""):
        return Check(self.name + suffix, [*self.program, "throughput", *self.model, *flags, *self.work], 180, judge=judge,
                     log="benches")

    def figures(self, code, text, suffix=""):
        figures = json_of(text)
        if code != 0 or not figures:
            return None
        self.rates[suffix] = figures[f"{self.measured}_tokens_per_s"]["median"]
        return figures

    def planned(self, stages, goal):
        """The cut that is made where nobody asks for one."""
        bubble_goal = BUBBLE_GOAL if stages > 1 and self.requests == BUBBLE_REQUESTS else None

        def judge(code, text):
            figures = self.figures(code, text)
            if not figures:
                self.costs().unlink(missing_ok=True)
                return last_line(code, text), False
            self.costs().write_text(json.dumps(figures))
            rate, steady = self.rates[""], figures["pipeline"]["steady"]
            shown, ok = f"{rate:,.1f} {self.measured} tokens/s", not goal or rate >= goal
            if goal:
                shown += f", {rate / goal:.2f} of the goal of {goal:,}"
            if bubble_goal and steady:
                shown += f", bubble {steady['bubble']:.1%} (goal {bubble_goal:.0%}), imbalance {steady['imbalance']:.1%}"
                ok = ok and steady["bubble"] <= bubble_goal
            if bubble_goal and not steady:
                shown, ok = f"{shown}, no bubble measured", False
            return self.against_one(shown, ok)
        return self.check(["--stages", stages], judge)

    def against_one(self, shown, ok):
        goal = RATIO_GOALS.get(self.name)
        if not goal or "-one" not in self.rates:
            return shown, ok
        ratio = self.rates[""] / self.rates["-one"]
        return f"{shown}, {ratio:.2f} times one stage (goal {goal})", ok and ratio >= goal

    def one(self):
        def judge(code, text):
            if not self.figures(code, text, "-one"):
                return last_line(code, text), False
            return f"{self.rates['-one']:,.1f} {self.measured} tokens/s on one stage", True
        return self.check(["--stages", 1], judge, "-one")

    def other(self, suffix, flags):
        """Another cut than the planned one, which should be as good or better."""
        def judge(code, text):
            figures = self.figures(code, text, suffix)
            if not figures:
                return last_line(code, text), False
            steady, rate = figures["pipeline"]["steady"], self.rates[suffix]
            shown = f"{rate:,.1f} {self.measured} tokens/s, {figures['layout']}"
            shown += f", imbalance {steady['imbalance']:.1%}" if steady else ""
            if "" not in self.rates:
                return shown, True
            ratio = self.rates[""] / rate
            return f"{shown}; the planned cut reaches {ratio:.3f} of it (goal {PLANNED_GOAL})", ratio >= PLANNED_GOAL
        return self.check(flags, judge, suffix)

    def costs(self):
        return self.logs / f"{self.name}.json"

    def simulated(self):
        """The scheduler under a virtual clock, with what the measured run's passes cost."""
        def judge(code, text):
            figures = json_of(text)
            if code != 0 or not figures:
                return last_line(code, text), False
            measured = json.loads(self.costs().read_text())["pipeline"]
            if not measured["steady"] or not figures["decode"]:
                return "no steady phase to compare", False
            is_, was = figures["decode"]["bubble"], measured["steady"]["bubble"]
            whole = 1 - max(stage["busy"] for stage in figures["stages"]), measured["whole"]["bubble"]
            shown = f"bubble {is_:.1%}, measured {was:.1%} (goal: within {SIMULATED_GOAL:.0%})"
            return f"{shown}; of the whole run {whole[0]:.1%}, measured {whole[1]:.1%}", abs(is_ - was) <= SIMULATED_GOAL
        # Where it runs it is known whether the head is split.
        command = f'head=$(grep -q head@all {self.costs()} && echo --gathering-us {GATHERING_US}); exec "$@" $head'
        command = ["sh", "-c", command, "sh", *self.program, "simulate", "--costs", self.costs(), *self.work]
        return Check(f"{self.name}-simulated", command, 60, judge=judge, log="benches")

    def groups(self, count, goal):
        """Its checks, one after another."""
        several = count >= 4
        checks = [self.one()] if several and self.name in RATIO_GOALS else []
        checks.append(self.planned(count, goal))
        if several and self.requests == BUBBLE_REQUESTS:
            checks.append(self.simulated())
        if several and self.name in HAND:
            checks.append(self.other("-hand", ["--layout", HAND[self.name]]))
            checks.append(self.other("-even", ["--stages", count, "--split", "even"]))
        return [[check] for check in checks]


class Images:
    """Requests with images, by their new tokens: on all GPUs, on one, and with the tower on the first alone."""

    def __init__(self, bundle, new):
        requests, given = IMAGES
        self.name, self.new, self.rates = f"images-{requests}x{given}x{new}", new, {}
        self.command = [bundle / "bin" / "pipeline-infer", "bench", "throughput", "--model", bundle / "models" / "vl7b", "--weights",
                        "dummy", "--requests", requests, "--images", 1, "--prepared", "--input-len", given, "--output-len", new,
                        "--format", "json"]

    def check(self, suffix, flags, over=()):
        """`over`: the rates of which this one should be a multiple, with their goals."""
        def judge(code, text):
            figures = json_of(text)
            if code != 0 or not figures:
                return last_line(code, text), False
            rate, most = figures["images"]["images_per_s"]["median"], memory_over(figures)
            self.rates[suffix] = rate
            busy = "/".join(f"{stage['busy']:.0%}" for stage in figures["images"]["stages"])
            shown, ok = f"{rate:.1f} images/s, tower busy {busy}", most is None or most <= MEMORY_GOAL
            shown += f", {100 * (most - 1):+.2f}% of memory" if most else ", memory not counted"
            for other, goal in over:
                if goal and other in self.rates:
                    ratio = rate / self.rates[other]
                    shown, ok = f"{shown}, {ratio:.2f} times {other} (goal {goal})", ok and ratio >= goal
            return shown, ok
        return Check(self.name + suffix, [*self.command, *flags], 240, judge=judge, log="benches")

    def groups(self, count):
        if count < 4:
            return [[self.check("", ["--stages", count])]]
        of_one, of_first = IMAGE_GOALS[self.new]
        checks = [self.check("-one", ["--stages", 1])]
        if of_first:
            layout = "vision@cuda:0,0-6@cuda:0,7-13@cuda:1,14-20@cuda:2,21-27@cuda:3"
            checks.append(self.check("-first", ["--layout", layout]))
        checks.append(self.check("", ["--stages", 4], [("-one", of_one), ("-first", of_first)]))
        return [[check] for check in checks]


def memory_over(figures):
    """What the fullest GPU has in use over what its stages say; None where nobody counts."""
    told, peak = {}, {}
    for stage in [*figures["stages"], *(figures.get("images") or {}).get("stages", [])]:
        device, parts = stage["device"], ("weight_bytes", "kv_bytes", "buffer_bytes")
        told[device] = told.get(device, 0) + sum(stage.get(part) or 0 for part in parts)
        peak[device] = max(peak.get(device, 0), stage["device_bytes_peak"] or 0)
    return max((peak[device] / told[device] for device in told if peak[device]), default=None)


def judge_load(code, text):
    """Of load_speed.py: each number of stages' last loading, and the GPU that has most in use beyond what was said of it."""
    parts, ok = [], code == 0
    for block in re.split(r"(?=^\d+ stages, loading 1:)", text, flags=re.M)[1:]:
        stages = re.match(r"\d+", block)[0]
        rates = re.findall(r"GB/s, ([\d.]+) a GPU$", block, re.M)
        over = [float(percent) for percent in re.findall(r"in use, ([+-][\d.]+)%", block)]
        ok = ok and bool(rates) and bool(over) and "not counted" not in block
        memory = f"{max(over):+.2f}% of memory" if over else "memory not counted"
        parts.append(f"{stages} stages {rates[-1] if rates else '?'} GB/s a GPU, {memory}")
    return "; ".join(parts) or last_line(code, text), ok and bool(parts)


def judge_late(code, text):
    figures = json_of(text)
    if code != 0 or not figures:
        return judge_tests(code, text)[0], False
    late = figures["late_prompt"]
    ratio = late["gap_max_over_median"]
    return f"longest gap {late['gap_max_ms']:.1f} ms, {ratio:.2f} medians (goal {LATE_GOAL}); its token after {late['ttft_ms']:.0f} ms", ratio <= LATE_GOAL


def judge_relayout(code, text):
    figures = json_of(text)
    if code != 0 or not figures:
        return judge_tests(code, text)[0], False
    plain, moved = figures["runs"][:2], figures["runs"][2:]
    stall = 1e3 * max(seconds(run["relayout"]["stall"]) for run in moved)
    gap, usual = max(run["gap_max_ms"] for run in moved), max(run["gap_max_ms"] for run in plain)
    differ, noise = max(run["requests_different"] for run in moved), plain[1]["requests_different"]
    return (f"stall {stall:.0f} ms (goal {RELAYOUT_GOAL:.0f}), longest gap {gap:.0f} ms, without {usual:.0f} ms; "
            f"{differ} requests with other tokens, without {noise}"), stall <= RELAYOUT_GOAL and gap <= RELAYOUT_GOAL


def seconds(duration):
    return duration["secs"] + duration["nanos"] / 1e9


def judge_prefix(reuse, times):
    def judge(code, text):
        figures = json_of(text)
        if code != 0 or not figures:
            return judge_tests(code, text)[0], False
        times[reuse] = figures["ttft_ms"]["median"]
        if not reuse or False not in times:
            return f"{times[reuse]:.1f} ms to the first token", True
        ratio = times[False] / times[True]
        return f"{times[True]:.1f} ms to the first token, {ratio:.1f} times sooner (goal {PREFIX_GOAL:.0f})", ratio >= PREFIX_GOAL
    return judge


def judge_attention(code, text):
    found = re.findall(r"decode attention (\S+): ([\d.]+) us, (\d+) GB/s, ([\d.]+) of", text)
    if code != 0 or not found:
        return judge_tests(code, text)[0], False
    shown = "; ".join(f"{heads} heads {us} us, {rate} GB/s, {share} of a copy" for heads, us, rate, share in found)
    return f"{shown} (goal {ATTENTION_GOAL:.2f})", all(float(share) >= ATTENTION_GOAL for *_, share in found)


def judge_tower(code, text):
    product = re.search(r"8192x8192x8192: (\d+) TFLOP/s", text)
    towers = re.findall(r"^tower (\S+): \d+ us, ([\d.]+) images/s, (\d+) TFLOP/s, ([\d.]+) of", text, re.M)
    frame = re.search(r"^op frame: .*, (\d+) TFLOP/s", text, re.M)
    if code != 0 or not (product and towers and frame):
        return judge_tests(code, text)[0], False
    attention = int(frame[1]) / int(product[1])
    shown = "; ".join(f"{size} {images} images/s, {share} of a product" for size, images, _, share in towers)
    return f"{shown} (goal {TOWER_GOAL:.2f}); attention to a frame {attention:.2f}", float(towers[0][3]) >= TOWER_GOAL


def judge_boundary(stages, times):
    """`times`: microseconds per token by number of stages, of the checks so far."""
    def judge(code, text):
        lines = [line for line in text.splitlines() if line.startswith("{")]
        if code != 0 or not lines:
            return last_line(code, text), False
        times[stages] = json.loads(lines[-1])["tpot_ms"]["median"] * 1e3
        shown = f"{times[stages]:,.1f} us per token"
        if stages == 1 or 1 not in times:
            return shown, True
        each = (times[stages] - times[1]) / (stages - 1)
        return f"{shown}, {each:+.1f} us a boundary (goal {BOUNDARY_GOAL:.0f})", each <= BOUNDARY_GOAL
    return judge


def show_failure(check, text):
    print(f"--- {check.name}: {check.outcome}; the end of {check.log}:")
    hazards = [line for line in text.splitlines() if line.startswith("=========")][:60]
    print("\n".join(panics(text) or text.splitlines()[-25:]) + "\n" + "\n".join(hazards), flush=True)


def panics(text):
    """What failed tests said, each in a few lines."""
    said = [block.splitlines()[:6] for block in re.split(r"\n(?=---- )", text) if block.startswith("---- ")]
    return [line[:400] for block in said[:12] for line in block if line]


def alone(check, text, env, limit):
    """An access out of bounds fails all tests after it too: those that did not pass are run again, each by itself."""
    listed = subprocess.run([check.command[0], "--list"], capture_output=True, text=True, env=env).stdout
    chosen = check.command[2:]
    names = [n for n in re.findall(r"^(\S+): test$", listed, re.M) if all(c in n for c in chosen)]
    passed = set(re.findall(r"^test (\S+) \.\.\. ok$", text, re.M))
    names = [name for name in names if name not in passed]
    end, failed = time.time() + limit, []

    def run(name):
        left = end - time.time()
        if left < 1:
            return name, "not tried"
        try:
            done = subprocess.run([check.command[0], "--exact", name], capture_output=True, text=True, env=env,
                                  timeout=min(60, left))
        except subprocess.TimeoutExpired:
            return name, "not done in time"
        if done.returncode == 0:
            return name, None
        return name, "\n    ".join(panics(done.stdout)[1:] or [f"exit code {done.returncode}", *done.stderr.splitlines()[-3:]])

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for name, why in pool.map(run, names):
            failed += [name] if why else []
            print(f"alone: {name}: {why or 'ok'}", flush=True)
    check.outcome += f"; alone {len(failed)} of {len(names)} fail: {' '.join(failed[:6])}{' …' * (len(failed) > 6)}"


def libraries():
    """For LD_LIBRARY_PATH: what it is, and folders with NVRTC and cublasLt."""
    given = [p for p in os.environ.get("LD_LIBRARY_PATH", "").split(":") if p]
    packages = pathlib.Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    toolkits = [pathlib.Path("/usr/local/cuda/lib64"), *sorted(pathlib.Path("/usr/local").glob("cuda-*/lib64"))]
    for name in ("libnvrtc.so*", "libcublasLt.so*"):
        folders = (str(f) for f in [*map(pathlib.Path, given), *toolkits, *sorted(packages.glob("*/lib"))] if any(f.glob(name)))
        given.append(next(folders, ""))
    return list(dict.fromkeys(p for p in given if p))


def sanitizer():
    toolkits = [pathlib.Path("/usr/local/cuda/bin/compute-sanitizer"),
                *pathlib.Path("/usr/local").glob("cuda*/bin/compute-sanitizer"),
                *pathlib.Path("/usr/local").glob("cuda*/compute-sanitizer/compute-sanitizer")]
    return shutil.which("compute-sanitizer") or next((str(p) for p in toolkits if p.exists()), None)


def gpus():
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60).stdout
    except OSError:
        return []
    return [line for line in listed.splitlines() if line.startswith("GPU ")]


def plan(bundle, logs, count, test_filter, load_folder):
    """Groups of checks; those of a group run at the same time."""
    programs = bundle / "bin"
    threads = f"--test-threads={max(1, min(8, (os.cpu_count() or 2) // 2))}"
    chosen = [test_filter] if test_filter else []
    groups = [[Check("ops", [programs / "gpu", threads, *chosen], 300)],
              [Check("models", [programs / "gpu_model", threads, *chosen], 300)]]
    if not test_filter:
        groups.append([Check("faults", [programs / "lib", "--nocapture", "fault_tests::gpu", "vision::needs"], 300)])
    if sanitizer():
        skips = [part for name in NOT_SANITIZED for part in ("--skip", name)]
        quick = {"PIPELINE_INFER_GPU_QUICK": "1"}

        def under(tool, *more):
            command = [sanitizer(), "--tool", tool, "--error-exitcode", "9", "--print-limit", "100", *more,
                       programs / "gpu", "--test-threads=1", *skips, *chosen]
            judge = judge_races if tool == "racecheck" else judge_memory
            return Check(tool, command, 400 if tool == "racecheck" else 240, quick, judge)
        groups.append([under("memcheck"), under("racecheck", "--racecheck-report", "analysis")])
    for model, requests, given, new, measured, goals in BENCHES:
        if count >= (1 if model == "7b" else 4) and not test_filter:
            groups += Bench(bundle, logs, model, requests, given, new, measured).groups(count, goals.get(count))
    if count >= 4 and not test_filter:
        bench = [programs / "pipeline-infer", "bench", "throughput", "--model", bundle / "models" / "7b", "--weights", "dummy",
                 "--stages", count, "--format", "json", "--requests"]
        late = [*bench, 128, "--input-len", 512, "--output-len", 512, "--then-input-len", 8192]
        groups.append([Check("late", late, 120, judge=judge_late, log="benches")])
        cuts = [",".join(f"{cut}@cuda:{i}" for i, cut in enumerate(of)) for of in
                (("0-6", "7-14", "15-22", "23-27"), ("0-7", "8-14", "15-22", "23-27"))]
        relayout = [programs / "pipeline-infer", "bench", "relayout", "--model", bundle / "models" / "7b", "--weights", "dummy",
                    "--layout", cuts[0], "--to", cuts[1], "--slots", 4, "--chunk", 2048, "--requests", 64, "--input-len", 512,
                    "--output-len", 256, "--format", "json"]
        groups.append([Check("relayout", relayout, 180, judge=judge_relayout, log="benches")])
        prefix, times = [*bench, 64, "--input-len", 2112, "--shared-prefix", 2048, "--output-len", 16], {}
        for reuse, flags in ((False, ["--no-prefix-cache"]), (True, [])):
            name = f"prefix-{'on' if reuse else 'off'}"
            groups.append([Check(name, [*prefix, *flags], 120, judge=judge_prefix(reuse, times), log="benches")])
    if not test_filter:
        for new in IMAGE_GOALS:
            groups += Images(bundle, new).groups(count)
        command = [programs / "gpu", "--ignored", "--nocapture", "--test-threads=1", "speed::decode_attention",
                   "speed::prompt_attention"]
        groups.append([Check("attention", command, 120, judge=judge_attention)])
        command = [programs / "gpu", "--ignored", "--nocapture", "--test-threads=1", "tower_time::"]
        groups.append([Check("tower", command, 180, judge=judge_tower)])
        times = {}
        for stages in BOUNDARY_STAGES:
            command = [programs / "pipeline-infer", "bench", "throughput", "--model", bundle / "models" / "7b", "--weights", "dummy",
                       "--stages", stages, "--requests", 1, "--input-len", 512, "--output-len", 128, "--repeat", 5,
                       "--format", "json"]
            groups.append([Check(f"boundary-{stages}", command, 120, judge=judge_boundary(stages, times), log="benches")])
    if not test_filter and room_to_load(load_folder):
        command = [sys.executable, HERE / "load_speed.py", load_folder, "--bundle", bundle, "--stages", *sorted({1, count})]
        groups.append([Check("load", command, 300, {"PYTHONUNBUFFERED": "1"}, judge_load)])
    return groups


def room_to_load(folder):
    """Whether there is a disk for the checkpoint, or the checkpoint."""
    if (folder / "model.safetensors.index.json").exists():
        return True
    parent = next(parent for parent in folder.absolute().parents if parent.exists())
    return shutil.disk_usage(parent).free >= LOAD_DISK


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("bundle", nargs="?", type=pathlib.Path, default=HERE)
    args.add_argument("--only", nargs="+", default=[], help="names of checks, or their beginnings")
    args.add_argument("--skip", nargs="+", default=[], help="likewise")
    args.add_argument("--filter", help="only tests with this in their names, and no benches")
    args.add_argument("--load-folder", type=pathlib.Path, default=pathlib.Path(tempfile.gettempdir()) / "pipeline-infer-7b",
                      help="where the checkpoint for `load` is or is written, 15 GB")
    args.add_argument("--logs", type=pathlib.Path, default=pathlib.Path("gpu_check_logs"))
    args = args.parse_args()
    bundle = args.bundle.resolve()
    args.logs.mkdir(parents=True, exist_ok=True)
    found = gpus()
    if not found:
        print("SKIPPED: no GPU: nvidia-smi lists none")
        return
    print("\n".join(found), flush=True)
    env = {**os.environ, "PIPELINE_INFER_ROOT": str(bundle), "PIPELINE_INFER_REQUIRE_GPU": "1", "RUST_BACKTRACE": "0",
           "LD_LIBRARY_PATH": ":".join(libraries())}
    print("libraries:", env["LD_LIBRARY_PATH"] or "the system's", "| sanitizer:", sanitizer() or "none", flush=True)
    wanted = lambda name: ((not args.only or any(name.startswith(o) for o in args.only))
                           and not any(name.startswith(s) for s in args.skip))
    done = []
    for group in plan(bundle, args.logs.resolve(), len(found), args.filter, args.load_folder):
        group = [check for check in group if wanted(check.name)]
        for check in group:
            check.start(args.logs, env)
        for check in group:
            check.finish()
            if check.failed and check.name in ("ops", "models"):
                alone(check, check.text(), env, 120)
            done.append(check)
            print(f"{check.name}: {check.outcome} ({check.seconds:.0f} s)", flush=True)
    print(f"\n{'check':24} {'':6} {'seconds':>8}  outcome")
    if not args.filter and wanted("load") and not any(check.name == "load" for check in done):
        print(f"{'load':24} SKIPPED: {LOAD_DISK / 1e9:.0f} GB of disk are wanted for {args.load_folder}")
    if not sanitizer():
        for name in filter(wanted, ("memcheck", "racecheck")):
            print(f"{name:24} SKIPPED: no compute-sanitizer")
    for check in done:
        print(f"{check.name:24} {'FAILED' if check.failed else 'ok':6} {check.seconds:8.1f}  {check.outcome}")
    sys.exit(any(check.failed for check in done))


if __name__ == "__main__":
    main()
