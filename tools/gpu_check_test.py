#!/usr/bin/env python3
"""What gpu_check.py makes of programs' output. No GPU: `python3 tools/gpu_check_test.py`; `make check` runs it."""
import json, pathlib, tempfile, unittest

import gpu_check
from gpu_check import Bench, judge_load, judge_memory, judge_races

PASSED = "test a ... ok\ntest result: ok. 1 passed; 0 failed; 0 ignored\n"
OURS = "========= Error: Race reported between Write access at norm_rows+0x120 in x.cu\n=========     and Read access at {}+0x90 in x.cu [4 hazards]\n"
THEIRS = "========= Warning: Race reported between Write access at nvjet_hsh_64+0x1 in {}\n=========     and Read access at nvjet_hsh_64+0x2 [4 hazards]\n"


def races(records, hazards):
    return PASSED + "".join(records) + f"========= RACECHECK SUMMARY: {hazards} hazards displayed (1 error, 0 warnings)\n"


class Races(unittest.TestCase):
    def test_none(self):
        self.assertEqual(judge_races(0, races([], 0)), ("1 passed", True))

    def test_of_others_kernels_are_theirs(self):
        shown, ok = judge_races(9, races([THEIRS, THEIRS], 2))
        self.assertTrue(ok, shown)
        self.assertIn("2 in cublasLt's own kernels", shown)

    def test_of_ours_fail(self):
        for text in (races([OURS.format("norm_rows")], 1), races([THEIRS, OURS.format("void f<int, 4>(int *, int *)")], 2)):
            self.assertFalse(judge_races(9, text)[1], text)

    def test_a_third_access_counts(self):
        third = THEIRS + "=========     and Read access at norm_rows+0x3 [1 hazards]\n"
        self.assertFalse(judge_races(9, races([third], 1))[1])

    def test_hazards_that_no_record_was_read_of_fail(self):
        for text in (races([], 3), races(["========= Error: Potential hazard, in words of a newer release\n"], 1), races([THEIRS], 2)):
            shown, ok = judge_races(9, text)
            self.assertFalse(ok, text)
            self.assertIn("could not be read", shown)

    def test_a_record_without_two_names_fails(self):
        self.assertFalse(judge_races(9, races(["========= Error: Race reported between threads\n"], 1))[1])

    def test_without_a_summary_nothing_has_passed(self):
        self.assertFalse(judge_races(0, PASSED)[1])
        self.assertFalse(judge_memory(0, PASSED)[1])
        self.assertTrue(judge_memory(0, PASSED + "========= ERROR SUMMARY: 0 errors\n")[1])
        self.assertFalse(judge_memory(9, PASSED + "========= ERROR SUMMARY: 2 errors\n")[1])

    def test_the_sanitizers_code_without_a_hazard_fails(self):
        self.assertFalse(judge_races(9, races([], 0))[1])


def figures(output=14000.0, prompt=40000.0, bubble=0.02, steady=True):
    rate = lambda median: {"median": median, "best": median}
    phase = {"bubble": bubble, "imbalance": 0.04}
    return json.dumps({"output_tokens_per_s": rate(output), "prompt_tokens_per_s": rate(prompt), "layout": "0-6@cuda:0,…",
                       "pipeline": {"steady": phase if steady else None, "whole": {"bubble": 0.1}}})


class Benches(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)
        self.logs = pathlib.Path(self.folder.name)

    def bench(self, model="7b", requests=256, given=512, new=256, measured="output"):
        return Bench(pathlib.Path("bundle"), self.logs, model, requests, given, new, measured)

    def test_four_stages_are_compared_with_one_of_the_same_run(self):
        bench, prompts = self.bench(), self.bench(requests=32, given=4096, new=1, measured="prompt")
        for b, enough, few in ((bench, 2.2, 2.1), (prompts, 3.65, 3.5)):
            checks = {check.name: check for [check] in b.groups(4, 10000)}
            one, four = checks[f"{b.name}-one"], checks[b.name]
            self.assertEqual(list(checks)[0], one.name)
            self.assertTrue(one.judge(0, figures(10000.0, 10000.0))[1])
            for ratio, ok in ((enough, True), (few, False)):
                shown, passed = four.judge(0, figures(ratio * 10000, ratio * 10000))
                self.assertEqual(passed, ok, shown)
                self.assertIn("times one stage", shown)

    def test_goals_in_tokens_stay(self):
        [[check]] = self.bench().groups(1, 12277)
        self.assertFalse(check.judge(0, figures(12276))[1])
        self.assertTrue(check.judge(0, figures(12278, bubble=0.5))[1])
        self.assertFalse(check.judge(1, "")[1])
        check = self.bench().planned(4, 13203)
        self.assertFalse(check.judge(0, figures(30000, bubble=0.04))[1])
        self.assertFalse(check.judge(0, figures(30000, steady=False))[1])

    def test_the_simulators_bubble_is_within_two_points(self):
        bench = self.bench("72b", 256, 512, 128)
        checks = {check.name: check for [check] in bench.groups(4, None)}
        simulated = checks[f"{bench.name}-simulated"]
        self.assertIn(bench.costs(), simulated.command)
        self.assertTrue(checks[bench.name].judge(0, figures(bubble=0.02))[1])
        outcome = lambda bubble: simulated.judge(0, json.dumps({"decode": {"bubble": bubble}, "stages": [{"busy": 0.9}]}))
        self.assertTrue(outcome(0.035)[1])
        self.assertFalse(outcome(0.041)[1])
        self.assertFalse(simulated.judge(0, json.dumps({"decode": None, "stages": []}))[1])
        # What a run before has left is not compared with.
        checks[bench.name].judge(1, "error: no GPU")
        self.assertFalse(bench.costs().exists())

    def test_the_planned_cut_is_as_good_as_others(self):
        bench = self.bench()
        checks = {check.name.removeprefix(bench.name): check for [check] in bench.groups(4, None)}
        self.assertEqual(list(checks), ["-one", "", "-simulated", "-hand", "-even"])
        self.assertIn("0-7@cuda:0,8-14@cuda:1,15-21@cuda:2,22-27@cuda:3", checks["-hand"].command)
        self.assertNotIn("--stages", checks["-hand"].command)
        checks[""].judge(0, figures(28000))
        self.assertTrue(checks["-hand"].judge(0, figures(28100))[1])
        self.assertFalse(checks["-even"].judge(0, figures(29000))[1])


def seen(rate, peak=1000):
    stage = dict(device="cuda:0", weight_bytes=500, kv_bytes=300, buffer_bytes=100, device_bytes_peak=peak)
    tower = dict(device="cuda:0", weight_bytes=50, buffer_bytes=50, device_bytes_peak=peak, busy=0.5)
    return json.dumps({"stages": [stage], "images": {"images_per_s": {"median": rate}, "stages": [tower]}})


class Seeing(unittest.TestCase):
    def checks(self, new, count):
        images = gpu_check.Images(pathlib.Path("bundle"), new)
        return {check.name.removeprefix(images.name): check for [check] in images.groups(count)}

    def test_four_are_compared_with_one_and_with_the_tower_on_the_first(self):
        checks = self.checks(1, 4)
        self.assertEqual(list(checks), ["-one", "-first", ""])
        self.assertTrue(checks["-one"].judge(0, seen(10))[1] and checks["-first"].judge(0, seen(30))[1])
        self.assertTrue(checks[""].judge(0, seen(36))[1])
        self.assertFalse(checks[""].judge(0, seen(34.4))[1])
        self.assertFalse(checks[""].judge(0, seen(34.6))[1] and checks[""].judge(0, seen(34.4))[1])
        self.assertEqual(list(self.checks(128, 4)), ["-one", ""])
        self.assertEqual(list(self.checks(128, 1)), [""])

    def test_a_gpu_has_no_more_in_use_than_its_stages_say(self):
        [check] = self.checks(1, 1).values()
        self.assertTrue(check.judge(0, seen(10, 1030))[1])
        self.assertFalse(check.judge(0, seen(10, 1031))[1])
        self.assertFalse(check.judge(1, seen(10))[1] or check.judge(0, "")[1])


LOADED = """1 stages, loading 1: 1.00 s in all; 15.23 GB of weights at 18.0 GB/s, 18.0 a GPU
1 stages, loading 2: 0.90 s in all; 15.23 GB of weights at 24.0 GB/s, 24.0 a GPU
  cuda:0: weights 15,231 + KV 100,000 + buffers 900 MB; 116,500 MB in use, +0.31%
4 stages, loading 1: 0.90 s in all; 15.23 GB of weights at 88.0 GB/s, 22.0 a GPU
  cuda:0: weights 4,231 + KV 100,000 + buffers 900 MB; {}
reading alone, 64 processes: 30.0 GB/s
"""


class Loading(unittest.TestCase):
    def test_the_last_loading_of_each_number_of_stages_is_told(self):
        shown, ok = judge_load(0, LOADED.format("106,000 MB in use, +0.82%"))
        self.assertTrue(ok)
        self.assertEqual(shown, "1 stages 24.0 GB/s a GPU, +0.31% of memory; 4 stages 22.0 GB/s a GPU, +0.82% of memory")

    def test_what_is_not_known_has_not_passed(self):
        self.assertFalse(judge_load(0, LOADED.format("not counted"))[1])
        self.assertFalse(judge_load(1, LOADED.format("106,000 MB in use, +3.82%"))[1])
        self.assertFalse(judge_load(0, "")[1])

    def test_it_is_one_of_the_checks(self):
        with tempfile.TemporaryDirectory() as folder:
            made = pathlib.Path(folder) / "7b"
            made.mkdir()
            (made / "model.safetensors.index.json").touch()
            groups = gpu_check.plan(pathlib.Path("bundle"), pathlib.Path(folder), 4, None, made)
        names = [check.name for group in groups for check in group]
        self.assertEqual(len(names), len(set(names)))
        self.assertLessEqual({"load", "7b-32x4096x1-one", "72b-256x512x128-simulated", "7b-256x512x256-hand"}, set(names))


if __name__ == "__main__":
    unittest.main()
