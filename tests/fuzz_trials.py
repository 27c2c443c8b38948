"""Alters one input of a valid command at a time, thousands of times, and looks at how the command ends.

    python tests/fuzz_trials.py results/fuzz_trials.json [--trials 5000] [--seed 0] [--only KIND] [--trial NUMBER]

Good ends: `refused` (exit code 2, one line, nothing left behind), `same` (the result of the unaltered command) and `explained`
(another result of something that carries no checksum, or was signed again, with another digest on record; for options, any
other result). Faults: `traceback`, `hang`, `crash`, `changed` (another result that no digest explains), `noise` (more than our
one line) and `leftover` (a refusal that leaves or alters files). Each trial is a forked child, and follows from its seed and
number.
"""

import argparse
import contextlib
import faulthandler
import gc
import hashlib
import importlib
import json
import os
import pkgutil
import random
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MPLBACKEND": "agg"}

import fuzz_alterations as alterations
import fuzz_setup as setup
import matplotlib.pyplot
import numpy as np
import onnx
import torch
import typer
from PIL import Image
from safetensors.numpy import load

from modiff_trt.tools import provenance
from modiff_trt.tools.cli import main as cli

GOOD = ("refused", "same", "explained")
FAULTS = ("traceback", "hang", "crash", "changed", "noise", "leftover")
LIMIT, LINE, MEMORY = 20, 1100, 6 << 30
WHERE_AND_WHEN = {"command", "commit", "versions", "machine", "set", "reference"}
ABSURD = [
    "",
    "-1",
    "0",
    "nan",
    "inf",
    "1e999",
    "x",
    "\udcff",
    "ü\u2028\n",
    "0x10",
    "1.5",
    "-0",
    "9" * 5000,
    "x" * 100_000,
    "--",
]
ABSURD += ["[red]", "\x1b[31m", "%s%n", "a,b", ",", "0-0", "5-3", "1-", "\uff19", "\u00b2", "1_0", " 2 ", "None", "true"]
HUGE = ["2147483648", "9223372036854775807", "18446744073709551616", "1" + "0" * 30, "1e30"]
# Options that may ask for more work than anybody wants to wait for.
AMOUNTS = {"num_runs", "num_passes", "num_warmup", "iterations", "passes", "max_batch", "trial_images"}
PATH_OPTIONS = {"config", "ckpt", "scales", "onnx", "plan", "plans", "noise", "trajectories", "samples", "reference"}
PATH_OPTIONS |= {"same_noise", "inception", "evaluation", "plots", "bench", "model", "costs", "auto_scales", "context"}
PATHS = ["", ".", "in", "in/fifo", "in/loop", "in/dangling", "in/file", "in/file/x", "n" * 300, "n" * 100_000, "\udcff.npz"]
PATHS += ["/dev/zero", "/dev/full", "/dev/null", "/proc/self/mem", "/proc/version", "/proc/x/y", "a\nb", "in/dir.npz"]
PATHS += ["in/loop/x.npz"]
COMMANDS = {
    "collect": f"collect {setup.MODEL} {setup.COLLECT}",
    "calibrate": f"calibrate {setup.MODEL} --trajectories {{base}}/t.safetensors --preset fast --out OUT/s.safetensors",
    "quantize": f"quantize {setup.MODEL} --timesteps 2 --num-samples 1 --preset fast --out OUT/q",
    "export": f"export {setup.MODEL} --scales {{base}}/s.safetensors --out OUT/m.onnx",
    "sample": f"sample {setup.MODEL} --timesteps 2 --num-samples 1 --out OUT/s.npz",
    "sample ": f"sample {setup.MODEL} --timesteps 2 --num-samples 1 --out OUT/folder",
    "sample  ": f"sample {setup.MODEL} --timesteps 2 --num-samples 1 --shards --out OUT/folder",
    "sample onnx": "sample --backend onnx --onnx {base}/m.onnx --num-samples 1 --out OUT/s.npz",
    "sample native": f"sample {setup.MODEL} --backend native --scales {{base}}/s.safetensors --num-samples 1 --out OUT/s.npz",
    "bench": f"{setup.BENCH} torch-fp32 --out OUT/b.json",
    "evaluate": f"{setup.EVALUATE} --samples {{base}}/a --same-noise {{base}}/b",
    "package": "package --onnx {base}/m.onnx --out OUT/sampler",
    "build": "build --onnx {base}/m16.onnx --out OUT/plans",
    "verify": "verify --onnx {base}/m.onnx --plan {base}/p/m.plan",
    "inspect": "inspect {base}/s.safetensors",
    "report": setup.REPORT,
    "demo": "demo --num-samples 0 --out OUT/demo",
    "sampler": "!sampler {base}/sampler -n 1 --out OUT/s.npz",
}
ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MODIFF_TRT_CACHE", "COLUMNS", "OMP_NUM_THREADS", "TMPDIR")
OPTIONS = ("options", "outputs", "environment")
KINDS = (*setup.KINDS, *OPTIONS)


def preload():
    for part in ("core", "networks", "runtime", "export", "engines", "tools"):
        package = importlib.import_module(f"modiff_trt.{part}")
        for module in pkgutil.walk_packages(package.__path__, f"modiff_trt.{part}."):
            if module.name.rsplit(".", 1)[1] not in ("profiling", "train", "train_classifier", "entry", "cuda_kernels"):
                importlib.import_module(module.name)


def fork(folder, run, environment=()):
    """(exit code, or minus the signal, or None past the limit; standard output; standard error) of `run` in a child."""
    sys.stdout.flush()
    files = [os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_TRUNC) for name in (".stdout", ".stderr")]
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setsid()
            os.chdir(folder)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(files[0], 1)
            os.dup2(files[1], 2)
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            os.environ.update(environment)
            faulthandler.register(signal.SIGUSR1)
            code = run()
        except SystemExit as exit_:
            code = exit_.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code if isinstance(code, int) else 0)
    handle = os.pidfd_open(child)
    waiter = select.poll()
    waiter.register(handle, select.POLLIN)
    ended = waiter.poll(LIMIT * 1000)
    if not ended:
        os.kill(child, signal.SIGUSR1)  # where it is
        time.sleep(0.2)
        os.killpg(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    texts = [Path(f"/proc/self/fd/{file}").read_bytes()[:1_000_000].decode("utf-8", "replace") for file in files]
    for file in (handle, *files):
        os.close(file)
    return (os.waitstatus_to_exitcode(status) if ended else None, *texts)


def split(tree, digests):
    """What is left of a tree of JSON without its digests, which are collected, and without where and when it was made."""
    if isinstance(tree, dict):
        digests += [f"{key} {value}" for key, value in tree.items() if "sha256" in key or key == "made by"]
        kept = {k: v for k, v in tree.items() if "sha256" not in k and k not in WHERE_AND_WHEN}
        return {key: split(value, digests) for key, value in kept.items()}
    if isinstance(tree, str) and tree.startswith("the set "):  # and its name
        return "the set"
    return [split(value, digests) for value in tree] if isinstance(tree, list) else tree


def content(file, digests):
    """What matters of an output file, in a form that can be compared."""
    data = file.read_bytes()
    if file.suffix == ".json":
        tree = json.loads(data)
        return split(tree["sets"].get("x") if "sets" in tree else tree, digests)
    if file.suffix == ".npz":
        with np.load(file) as arrays:
            found = {k: v for k, v in arrays.items() if k != "manifest"}
            return [setup.describe(found), split(json.loads(str(arrays["manifest"])), digests)]
    if file.suffix == ".safetensors":
        return [split(json.loads(alterations.inner_read(file)), digests), setup.describe(load(data))]
    if file.suffix == ".onnx":
        graph = onnx.load_from_string(data).graph.SerializeToString(deterministic=True)
        return [split(json.loads(alterations.onnx_read(file)), digests), hashlib.sha256(graph).hexdigest()]
    if file.suffix == ".html":
        text = data.decode()
        digests += re.findall("[0-9a-f]{64}", text)
        return hashlib.sha256(re.sub('[0-9a-f]{64}|"(command|commit)": .*', "", text).encode()).hexdigest()
    if file.suffix == ".png":
        with Image.open(file) as image:
            return hashlib.sha256(image.tobytes()).hexdigest()
    return hashlib.sha256(data).hexdigest()


def result(folder, words, output):
    """(figures, digests) of what a command has made: its files, or its text where that is the result."""
    digests = []
    if words[0].startswith("!") and words[0] != "!sampler":
        return split(json.loads(output), digests), digests
    if words[0] == "inspect":
        return output, digests
    place = folder / ("in" if "--out IN" in " ".join(words) else "out")
    figures = {}
    for file in sorted(place.rglob("*")):
        if file.is_file() and file.name not in ("manifest.sha256", ".lock", "modiff-sampler"):
            figures[file.name] = content(file, digests)
    return figures, sorted(set(digests))


def snapshot(folder):
    found = {}
    for top, folders, files in os.walk(folder):
        for name in (*folders, *files):
            if not name.startswith((".stdout", ".stderr")):
                status = os.lstat(os.path.join(top, name))
                found[os.path.join(top, name)] = None if name in folders else (status.st_size, status.st_mtime_ns)
    return found


class Trials:
    """A set-up in `base`, and trials on copies of parts of it."""

    def __init__(self, base, seed):
        self.base, self.seed, self.expected = base, seed, {}
        self.cache = base / "cache"
        os.environ["MODIFF_TRT_CACHE"] = str(self.cache)
        group = typer.main.get_command(cli.app)
        self.options = {name: command.params for name, command in group.commands.items()}

    def make(self):
        steps = [lambda: setup.make_files(self.base)]
        steps += [lambda c=c: setup.run_command(self.words(c)) for c in setup.MAKE]
        for step in [*steps, lambda: setup.make_plan(self.base)]:
            code, out, err = fork(self.base, step)
            if code not in (0, None):
                sys.exit(f"the set-up could not be made: {out}{err}")
        for name in (".stdout", ".stderr"):
            (self.base / name).unlink()

    def warm_up(self):
        """Runs some commands here, so that children need not import what they import, nor build the command line."""
        group = typer.main.get_command(cli.app)
        typer.main.get_command = lambda app: group
        kept, threads = (os.dup(1), os.dup(2)), len(os.listdir("/proc/self/task"))
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        for name in ("collect", "calibrate", "sample", "evaluate", "fd", "report"):
            command = COMMANDS.get(name) or setup.SAME32[0].replace("--features none", "").replace("IN", "{base}/guided.npz")
            with self.folder("") as folder, contextlib.suppress(SystemExit):
                setup.run_command([word.replace("OUT", str(folder)) for word in self.words(command)])
        sys.stdout.flush()
        sys.stderr.flush()
        for stream in (1, 2):
            os.dup2(kept[stream - 1], stream)
        if len(os.listdir("/proc/self/task")) > threads:
            sys.stdout.write("threads run in the parent: children may hang\n")

    def words(self, command):
        return [word.replace("{base}", str(self.base)) for word in command.split()]

    def run(self, folder, words, name="", environment=()):
        words = [re.sub("^IN", f"in/{name}", word).replace("OUT", "out") for word in words]
        return fork(folder, lambda: setup.run_command(words), environment)

    def unaltered(self, artefact, command):
        """The result of a command with nothing altered; None where it does not succeed here."""
        key = artefact, command
        if key not in self.expected:
            with self.folder(artefact) as folder:
                environment = {"MODIFF_TRT_CACHE": str(folder / "in/cache")} if artefact == "cache" else {}
                code, out, _ = self.run(folder, self.words(command), artefact, environment)
                self.expected[key] = result(folder, self.words(command), out) if code == 0 else None
        return self.expected[key]

    @contextlib.contextmanager
    def folder(self, artefact):
        with tempfile.TemporaryDirectory(dir=self.base.parent, ignore_cleanup_errors=True) as made:
            folder = Path(made)
            for name in ("in", "out"):
                (folder / name).mkdir()
            if artefact:
                source = self.base / artefact
                (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / "in" / artefact)
            yield folder

    def trial(self, number):
        kind = KINDS[number % len(KINDS)]
        chance = random.Random(f"{self.seed} {number}")
        np.random.seed(number)
        while True:
            try:
                return (self.of_options if kind in OPTIONS else self.of_artefact)(kind, number, chance)
            except alterations.Unfit:
                continue

    def of_artefact(self, kind, number, chance):
        target = chance.choice(setup.KINDS[kind])
        command = chance.choice(target.commands)
        how = chance.choice([*target.alterations, *(["another artefact"] * 3)])
        expected = self.unaltered(target.artefact, command)
        with self.folder(target.artefact) as folder:
            whole = folder / "in" / target.artefact
            file = chance.choice(sorted(whole.glob(target.files))) if target.files else whole
            if how == "another artefact":
                others = sorted(f for f in self.base.rglob("*") if f.is_file() and f.stat().st_size < 10**6)
                other = chance.choice(others)
                if not file.is_file():
                    raise alterations.Unfit
                shutil.copy(other, file)
                how = f"another artefact ({other.relative_to(self.base)})"
                name = target.artefact
            else:
                try:
                    name = target.alterations[how](chance, file) or target.artefact
                except (ValueError, RecursionError, KeyError, OverflowError, StopIteration, TypeError):
                    raise alterations.Unfit from None  # values that cannot be written, or signed, in this way
            environment = {"MODIFF_TRT_CACHE": str(folder / "in/cache")} if target.artefact == "cache" else {}
            before = snapshot(folder)
            done = self.run(folder, self.words(command), name, environment)
            allowed = target.foreign or how.startswith(("re-signed", "another artefact"))
            # Without our manifest it is a set of another program, and the results say so.
            allowed |= file.name == "manifest.json" and how in ("absent", "link loop", "dangling link", "JSON")
            verdict = self.judge(folder, before, done, expected, command, allowed)
        inside = f" of {file.name}" if target.files else ""
        return self.record(number, kind, f"{target.artefact}{inside}: {how}", command, verdict, done)

    def of_options(self, kind, number, chance):
        command = COMMANDS[chance.choice(sorted(COMMANDS))]
        words, environment = self.words(command), {}
        expected = self.unaltered("", command)
        if kind == "environment":
            name = chance.choice(ENVIRONMENT)
            value = chance.choice([*(ABSURD if name != "TMPDIR" else ["in/dir"]), *HUGE[:3]])
            environment[name] = value.replace("\0", "")
        elif kind == "outputs":
            if "--out" not in words:
                raise alterations.Unfit
            name, value = "--out", chance.choice(PATHS)
            words[words.index(name) + 1] = value
        else:
            if words[0] == "!sampler":
                name = chance.choice(["-n", "--seeds", "--seed", "--batch-size", "--eta", "--noise", "--device", "-x"])
                path, amount = name == "--noise", False
            else:
                option = chance.choice(self.options[words[0]])
                name, path = option.opts[0], option.name in PATH_OPTIONS
                amount = option.name in AMOUNTS
                if option.name == "out":
                    raise alterations.Unfit
            value = chance.choice(PATHS if path else ABSURD + ([] if amount else HUGE))
            value = [] if not path and chance.random() < 0.05 else [value]
            if name in words:
                at = words.index(name)
                words[at + 1 : at + 2] = value
            elif name.startswith("-"):
                words += [name, *value]
            else:
                words[1:2] = value
        with self.folder("") as folder:
            for special, make in {"fifo": os.mkfifo, "dir.npz": os.mkdir, "file": Path.touch}.items():
                make(folder / "in" / special)
            (folder / "in/loop").symlink_to("loop")
            (folder / "in/dangling").symlink_to("nowhere")
            before = snapshot(folder)
            done = self.run(folder, words, "", environment)
            verdict = self.judge(folder, before, done, expected, command, True, True)
        shown = str(environment or f"{name} {value!r:.60}")
        return self.record(number, kind, shown, command, verdict, done)

    def judge(self, folder, before, done, expected, command, explainable, on_record=False):
        code, out, err = done
        if code is None:
            return "hang"
        if code < 0:
            return "crash"
        if code not in (0, 2) or "Traceback" in out + err:
            return "traceback"
        if code == 2:
            if not err.startswith("error: ") or err.count("\n") != 1 or len(err) > LINE:
                return "noise"
            return "refused" if snapshot(folder) == before else "leftover"
        if "Warning" in err or re.search(r"\[[EWF]:", err):
            return "noise"
        if on_record and expected is None:
            return "explained"
        try:
            figures, digests = result(folder, self.words(command), out)
        except Exception as error:
            return "explained" if on_record else f"changed ({type(error).__name__}: {error})"
        if expected is not None and "--out IN" in command:
            # Whatever else lies there is nobody's; a file that is written through a link has another name.
            lacking = [value for value in expected[0].values() if value not in figures.values()]
            figures = figures if lacking else expected[0]
        if expected is not None and figures == expected[0]:
            return "same"
        if explainable and command.startswith("inspect"):
            return "explained"
        return "explained" if on_record or (explainable and expected and digests != expected[1]) else "changed"

    def record(self, number, kind, how, command, verdict, done):
        said = (done[2] or done[1]).replace("\n  ", "\n")
        text = said[-300:] if verdict == "traceback" else said[:300]
        return {"trial": number, "kind": kind, "alteration": how, "command": command, "class": verdict, "output": text}


def table(records):
    rows = {}
    for kind in KINDS:
        of_kind = [record["class"].split(" ")[0] for record in records if record["kind"] == kind]
        if of_kind:
            counts = Counter(of_kind)
            rows[kind] = {"trials": len(of_kind), **{name: counts[name] for name in (*GOOD, *FAULTS)}}
    return rows


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--trials", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=KINDS)
    parser.add_argument("--trial", type=int, help="this one alone")
    options = parser.parse_args()
    made_by = provenance.provenance()
    provenance._commit = lambda: None
    torch.set_num_threads(1)
    matplotlib.rcParams["svg.hashsalt"] = "the same names in every drawing"
    preload()
    sys.argv = ["modiff-trt"]
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    step = len(KINDS) if options.only else 1
    first = KINDS.index(options.only) if options.only else 0
    numbers = [options.trial] if options.trial is not None else range(first, first + step * options.trials, step)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        (Path(folder) / "base").mkdir()
        trials = Trials(Path(folder) / "base", options.seed)
        trials.make()
        trials.warm_up()
        gc.collect()
        gc.freeze()
        begin, records = time.monotonic(), []
        for number in numbers:
            started = time.monotonic()
            records.append(trials.trial(number))
            records[-1]["seconds"] = round(time.monotonic() - started, 3)
            if records[-1]["class"] not in GOOD:
                sys.stdout.write(json.dumps(records[-1]).replace(folder, "TEMPORARY") + "\n")
                sys.stdout.flush()
        seconds = time.monotonic() - begin
    faults = [record for record in records if record["class"] not in GOOD]
    rows = table(records)
    data = {
        "what": "one input of a valid command altered at a time: how the command ends",
        "seed": options.seed,
        "trials": len(records),
        "trials a second": round(len(records) / seconds, 2),
        "slowest trial, seconds": max(record["seconds"] for record in records),
        "table": rows,
        "total": {name: sum(row[name] for row in rows.values()) for name in ("trials", *GOOD, *FAULTS)},
        "faults": faults,
        **made_by,
    }
    options.out.write_text(json.dumps(data, indent=2).replace(folder, "TEMPORARY") + "\n")
    sys.stdout.write(json.dumps({k: v for k, v in data.items() if k != "faults"}, indent=2) + "\n")
    if options.trial is not None:
        sys.stdout.write(json.dumps(records, indent=2) + "\n")


if __name__ == "__main__":
    main()
