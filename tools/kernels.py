#!/usr/bin/env python3
"""Compiles every kernel in kernels/ with NVRTC for every architecture, and shows registers, shared memory and spills.

    python3 tools/kernels.py [FILE.cu …] [--arch sm_90a …] [--quiet] [--lib LIBNVRTC] [--cubin DIR]

No GPU, driver or toolkit is needed: NVRTC is taken from --lib, from the installed CUDA, or from its PyPI wheel, which is
fetched into .cache. A file names its variants in comment lines, every value with every value of the line:

    // variants: DTYPE=1,2 HEAD_DIM=64,128
    // variants for sm_90a,sm_100a: DTYPE=1,2 HEAD_DIM=256

A kernel that spills registers is an error, unless the file says `// spills: NAME` (a kernel that is not hot).
The exit code is 3 if there is no NVRTC to be had.
"""
import argparse, concurrent.futures, ctypes, itertools, os, pathlib, re, subprocess, sys, time, zipfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
KERNELS = ROOT / "kernels"
ARCHS = ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a"]
WHEEL = "nvidia-cuda-nvrtc==13.0.88"
NO_NVRTC = 3


def nvrtc(given):
    """The library, with its builtins loaded beside it."""
    lib = pathlib.Path(given) if given else from_wheel()
    for builtins in sorted(lib.parent.glob("libnvrtc-builtins.so.*")):
        ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(lib))


def from_wheel():
    at = ROOT / ".cache" / "nvrtc"
    lib = at / "nvidia" / "cu13" / "lib" / "libnvrtc.so.13"
    if not lib.exists():
        at.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(at), WHEEL]
        if subprocess.run(pip).returncode:
            print(f"{WHEEL} cannot be fetched from PyPI", file=sys.stderr)
            sys.exit(NO_NVRTC)
        wheel = next(at.glob("nvidia_cuda_nvrtc-*.whl"))
        with zipfile.ZipFile(wheel) as files:
            files.extractall(at)
        wheel.unlink()
    return lib


def variants(source, arch):
    """Every set of definitions that a file asks for, for this architecture."""
    for archs, line in re.findall(r"^// variants(?: for (\S+))?: (.*)$", source, re.M):
        if archs and arch not in archs.split(","):
            continue
        names, values = zip(*(part.split("=") for part in line.split()))
        for chosen in itertools.product(*(v.split(",") for v in values)):
            yield dict(zip(names, chosen))


class Compiler:
    def __init__(self, lib):
        self.lib = nvrtc(lib)
        headers = sorted(KERNELS.glob("*.cuh"))
        self.names = [h.name.encode() for h in headers]
        self.texts = [h.read_bytes() for h in headers]

    def compile(self, name, source, arch, defines):
        """The log and the cubin; raises on an error."""
        lib, program = self.lib, ctypes.c_void_p()
        n = len(self.names)
        strings = ctypes.c_char_p * n
        lib.nvrtcCreateProgram(ctypes.byref(program), source.encode(), name.encode(), n, strings(*self.texts), strings(*self.names))
        options = [f"--gpu-architecture={arch}", "--std=c++17", "-default-device", "--ptxas-options=-v"]
        options += [f"-D{k}={v}" for k, v in defines.items()]
        given = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
        failed = lib.nvrtcCompileProgram(program, len(options), given)
        log = self.text(program, lib.nvrtcGetProgramLogSize, lib.nvrtcGetProgramLog).decode(errors="replace")
        if failed:
            raise SystemExit(f"{name} {defines} for {arch}:\n{log.rstrip(chr(0))}")
        cubin = self.text(program, lib.nvrtcGetCUBINSize, lib.nvrtcGetCUBIN)
        lib.nvrtcDestroyProgram(ctypes.byref(program))
        return log, cubin

    @staticmethod
    def text(program, size_of, get):
        size = ctypes.c_size_t()
        size_of(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        get(program, buffer)
        return buffer.raw


def usage(log):
    """Per kernel: registers, shared memory, stack, bytes spilled."""
    kernels, name = {}, None
    for line in log.splitlines():
        if found := re.search(r"Compiling entry function '(\w+)'", line):
            name = found[1]
            kernels[name] = dict(registers=0, shared=0, stack=0, spills=0)
        elif name is None:
            continue
        if found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            kernels[name].update(stack=int(found[1]), spills=int(found[2]) + int(found[3]))
        if found := re.search(r"Used (\d+) registers", line):
            kernels[name]["registers"] = int(found[1])
        if found := re.search(r"(\d+) bytes smem", line):
            kernels[name]["shared"] = int(found[1])
    return kernels


def each_arch(args):
    """Compiles for several architectures at the same time, one a process; the first failure is the exit code."""
    if not args.lib:
        from_wheel()  # once, and not by all of them

    def run(arch):
        flags = [*map(str, args.files), "--arch", arch] + ["--quiet"] * args.quiet
        flags += ["--lib", args.lib] if args.lib else []
        flags += ["--cubin", str(args.cubin)] if args.cubin else []
        return subprocess.run([sys.executable, __file__, *flags], capture_output=True, text=True)

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for done in (runs := list(pool.map(run, args.arch))):
            print(done.stdout + done.stderr, end="")
    sys.exit(next((done.returncode for done in runs if done.returncode), 0))


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("files", nargs="*", type=pathlib.Path)
    args.add_argument("--arch", nargs="+", default=ARCHS)
    args.add_argument("--quiet", action="store_true", help="only errors and a last line")
    args.add_argument("--lib", help="libnvrtc.so to use")
    args.add_argument("--cubin", type=pathlib.Path, help="write cubins there")
    args = args.parse_args()
    if len(args.arch) > 1:
        each_arch(args)
    compiler, spilled, count, start = Compiler(args.lib), [], 0, time.time()
    for path in args.files or sorted(KERNELS.glob("*.cu")):
        source = path.read_text()
        may_spill = set(re.findall(r"^// spills: (\w+)", source, re.M))
        if not re.search(r"^// variants.*: ", source, re.M):
            raise SystemExit(f"{path}: no line `// variants: …`")
        sets = [(arch, defines) for arch in args.arch for defines in variants(source, arch)]
        for arch, defines in sets:
            log, cubin = compiler.compile(path.name, source, arch, defines)
            count += 1
            shown = " ".join(f"{k}={v}" for k, v in defines.items())
            if args.cubin:
                args.cubin.mkdir(parents=True, exist_ok=True)
                (args.cubin / f"{path.stem}-{arch}-{shown.replace(' ', '-')}.cubin").write_bytes(cubin)
            for name, use in usage(log).items():
                bad = use["spills"] > 0 and name not in may_spill
                if bad:
                    spilled.append(f"{path.name} {name} {arch} {shown}: {use['spills']} bytes")
                if not args.quiet or bad:
                    print(f"{path.stem:20} {name:28} {arch:8} {shown:28} {use['registers']:4} regs {use['shared']:6} shared "
                          f"{use['stack']:5} stack {use['spills']:5} spilled")
    if spilled:
        raise SystemExit("hot kernels spill registers:\n  " + "\n  ".join(spilled))
    print(f"{args.arch[0]}: {count} variants compiled in {time.time() - start:.0f} s, no hot kernel spills")


if __name__ == "__main__":
    main()
