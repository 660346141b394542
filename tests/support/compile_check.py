#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Tests whose subject is the compiler's answer. Standard library of Python only.

The work is done while building, so that Ninja repeats a check only when a file it read has changed: the commands
`std`, `header`, `reject`, `cuda` and `device_header` always succeed and write a result file, whose first line is an exit code, and a
depfile. The test proper is `report RESULT`, which prints that file and exits with that code.

std     the files that the C++ standard library's headers consist of, one a line
header  a public header is self-contained, survives other people's macros, defines no macros but RESTKV_ ones and,
        unless --third-party is given, includes only the standard library and other headers of the project
reject  a source that must not compile: the compiler must say what its comment `// expect: regex` says (or
        `// expect-gcc:`, `// expect-clang:`). With -DRESTKV_CONTROL the same file must compile, which shows that the
        failure comes from the line under test and nothing else.
cuda    a CUDA source compiles for every architecture asked for, without warnings, our kernels without register spills
        or local memory; with
        --resources TABLE no kernel needs more registers or shared memory than the table grants it, and the table names
        every kernel. The object lies beside the output, for a program that is linked with it.
device_header  a header for devices compiles alone, and included twice
resources      writes that table from the results of `cuda`: compile_check.py resources TABLE RESULT...
"""

import argparse
import os
import pathlib
import re
import subprocess
import sys
import tempfile

STANDARD_HEADERS = """algorithm any array atomic barrier bit bitset cassert cctype cerrno cfenv cfloat charconv chrono
    cinttypes climits clocale cmath codecvt compare complex concepts condition_variable coroutine csetjmp csignal
    cstdarg cstddef cstdint cstdio cstdlib cstring ctime cuchar cwchar cwctype deque exception execution expected
    filesystem format forward_list fstream functional future initializer_list iomanip ios iosfwd iostream istream
    iterator latch limits list locale map mdspan memory memory_resource mutex new numbers numeric optional ostream
    queue random ranges ratio regex scoped_allocator semaphore set shared_mutex source_location span sstream stack
    stdexcept stdfloat stop_token streambuf string string_view syncstream system_error thread tuple type_traits
    typeindex typeinfo unordered_map unordered_set utility valarray variant vector version
    immintrin.h arm_neon.h""".split()
# <execution> of libstdc++ includes TBB where that is installed, which would make TBB pass for standard.
STANDARD_HEADERS.remove("execution")

# Names that well-known headers define as macros. A public header that uses one breaks there. min and max are left out:
# only <windows.h> without NOMINMAX defines them, and the price would be (std::min)(a, b) throughout.
HOSTILE_MACROS = {
    "<windows.h>": "small near far interface ERROR IN OUT OPTIONAL DELETE DIFFERENCE VOID CONST TRUE FALSE",
    # Without Success: the enumerator of that name is how Eigen reports the outcome of a solver.
    "<X11/Xlib.h>": "None Bool Status Always True False Above Below",
    "<complex.h>": "I",
    "<termios.h>": "B0 B50 ECHO",
    "<sys/sysmacros.h>": "major minor makedev",
    "Qt": "signals slots emit foreach forever",
    "newlib's <ctype.h>": "_B _C _L _N _P _S _U _X",
    "<sys/param.h>": "MIN MAX",
    "logging libraries": "CHECK LOG DCHECK",
    "<math.h>": "M_PI HUGE OVERFLOW UNDERFLOW DOMAIN",
}

WARNINGS = ["-std=c++20", "-Wall", "-Wextra", "-Werror"]
ENVIRONMENT = dict(os.environ, LC_ALL="C")


def run(command, **options):
    return subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          errors="replace", env=ENVIRONMENT, **options)


def read_depfile(path):
    """The prerequisites in a Make depfile, as real paths."""
    try:
        text = pathlib.Path(path).read_text()
    except OSError:
        return []
    text = text.replace("\\\n", " ").split(":", 1)[-1]
    names = re.findall(r"(?:\\ |\S)+", text)
    return sorted({os.path.realpath(name.replace("\\ ", " ")) for name in names})


def write_depfile(path, target, files):
    escaped = " ".join(str(name).replace(" ", "\\ ") for name in files)
    pathlib.Path(path).write_text(f"{target}: {escaped}\n")


def is_clang(compiler):
    return "clang" in run(compiler + ["--version"]).stdout.split("\n", 1)[0]


def project_headers(roots):
    """Every header there is: what a check that failed before it could list its files may depend on."""
    suffixes = {".hpp", ".cuh"}
    return [str(p.resolve()) for root in roots for p in pathlib.Path(root).rglob("*") if p.suffix in suffixes]


def check_std(args):
    with tempfile.TemporaryDirectory() as folder:
        source = pathlib.Path(folder, "std.cpp")
        lines = [f"#if __has_include(<{name}>)\n#include <{name}>\n#endif" for name in STANDARD_HEADERS
                 if not name.endswith(".h")]
        lines += [f"#if __has_include(<{name}>) && (defined(__{arch}__))\n#include <{name}>\n#endif"
                  for name, arch in (("immintrin.h", "x86_64"), ("arm_neon.h", "aarch64"))]
        source.write_text("\n".join(lines) + "\n")
        depfile = pathlib.Path(folder, "std.d")
        result = run(args.compiler + ["-std=c++20", "-w", "-E", "-MD", "-MF", str(depfile), "-o", os.devnull,
                                      str(source)])
        if result.returncode != 0:
            sys.exit(result.stdout)
        files = [name for name in read_depfile(depfile) if not name.startswith(os.path.realpath(folder))]
    pathlib.Path(args.output).write_text("\n".join(files) + "\n")
    return None


def compile_text(args, folder, name, text, flags, log):
    """Compiles a source given as text; returns (succeeded, files read)."""
    source = pathlib.Path(folder, name + ".cpp")
    source.write_text(text)
    depfile = pathlib.Path(folder, name + ".d")
    result = run(args.compiler + WARNINGS + args.flag + flags + ["-fsyntax-only", "-MD", "-MF", str(depfile),
                                                                 str(source)])
    if result.returncode != 0:
        log.append(f"--- {name}:\n{result.stdout}")
    own = os.path.realpath(folder)
    return result.returncode == 0, [path for path in read_depfile(depfile) if not path.startswith(own)]


def check_header(args):
    log = []
    roots = [os.path.realpath(root) for root in args.root]
    paths = [flag for root in roots for flag in ("-I", root)]
    include = f"#include <{args.header}>\n"
    with tempfile.TemporaryDirectory() as folder:
        # Without exceptions and RTTI, as some engines are compiled; the second compilation has both.
        bare = [] if args.third_party else ["-fno-exceptions", "-fno-rtti"]
        passed, files = compile_text(args, folder, "self_contained", include * 2, paths + bare, log)
        own = [path for path in files if any(path.startswith(root + os.sep) for root in roots)]

        # Other people's headers come first, so that the macros meet only the project's own text.
        foreign = set()
        for path in own:
            for name in re.findall(r"^\s*#\s*include\s*[<\"]([^>\"]+)[>\"]", pathlib.Path(path).read_text(), re.M):
                if not name.startswith("restkv/"):
                    foreign.add(name)
        text = "".join(f"#if __has_include(<{name}>)\n#include <{name}>\n#endif\n" for name in sorted(foreign))
        for origin, names in HOSTILE_MACROS.items():
            for name in names.split():
                text += f"#undef {name}\n#define {name} @{name} is a macro of {origin}@\n".replace("'", "")
        if passed:
            compile_text(args, folder, "hostile_macros", text + include, paths, log)

    if not args.third_party and args.std_files:
        standard = set(pathlib.Path(args.std_files).read_text().split("\n"))
        for path in files:
            if path not in own and path not in standard:
                log.append(f"{args.header} includes {path}, which is not part of the standard library")
    for path in own:
        text = pathlib.Path(path).read_text()
        removed = set(re.findall(r"^\s*#\s*undef\s+(\w+)", text, re.M))
        for name in re.findall(r"^\s*#\s*define\s+(\w+)", text, re.M):
            if not name.startswith("RESTKV_") and name not in removed:
                log.append(f"{path} defines the macro {name}; macros begin with RESTKV_ or are undefined at the end")
    return (1 if log else 0), "\n".join(log), files or project_headers(roots)


def check_reject(args):
    source = pathlib.Path(args.source)
    expected = {}
    for kind, pattern in re.findall(r"^//\s*(expect(?:-gcc|-clang)?):\s*(.*\S)", source.read_text(), re.M):
        expected[kind] = pattern
    family = "expect-clang" if is_clang(args.compiler) else "expect-gcc"
    pattern = expected.get(family, expected.get("expect"))
    dependencies = [str(source.resolve())]
    if pattern is None:
        return 1, f"{source} says neither '// expect: regex' nor '// {family}: regex'", dependencies
    roots = [os.path.realpath(root) for root in args.root]
    command = args.compiler + WARNINGS + args.flag + [flag for root in roots for flag in ("-I", root)] + ["-fsyntax-only"]
    with tempfile.TemporaryDirectory() as folder:
        depfile = os.path.join(folder, "control.d")
        control = run(command + ["-DRESTKV_CONTROL", "-MD", "-MF", depfile, str(source)])
        dependencies += read_depfile(depfile) or project_headers(roots)
    if control.returncode != 0:
        return 1, f"{source} must compile with -DRESTKV_CONTROL:\n{control.stdout}", dependencies
    attempt = run(command + [str(source)])
    if attempt.returncode == 0:
        return 1, f"{source} compiles and must not", dependencies
    if not re.search(pattern, attempt.stdout):
        return 1, f"{source} is rejected, but not with /{pattern}/:\n{attempt.stdout}", dependencies
    return 0, f"rejected with /{pattern}/", dependencies


NVCC_FLAGS = ["-c", "-std=c++20", "--expt-relaxed-constexpr", "-Werror", "all-warnings", "-Xcompiler", "-Wall"]


def run_nvcc(args, source, flags):
    roots = [os.path.realpath(root) for root in args.root]
    command = args.compiler + NVCC_FLAGS + flags
    for arch in args.arch:
        command += [f"-gencode=arch=compute_{arch},code=sm_{arch}"]
    command += args.flag + [flag for root in roots for flag in ("-I", root)]
    depfile = args.output + ".nvcc.d"
    result = run(command + ["-MD", "-MF", depfile, "-o", args.output.removesuffix(".txt") + ".o", source])
    dependencies = read_depfile(depfile) or [os.path.realpath(source)] + project_headers(roots)
    return result, " ".join(command + [source]) + "\n" + result.stdout, dependencies


def kernel_name(symbol):
    """A kernel's demangled name, without the wrapper that every body runs through and without namespaces."""
    name = run(["c++filt", symbol]).stdout.strip().removeprefix("void ")
    # The parameters: from the parenthesis that the last one closes.
    depth = 0
    for begin in range(len(name) - 1, -1, -1):
        depth += {")": 1, "(": -1}.get(name[begin], 0)
        if depth == 0:
            break
    name = name[:begin] if name.endswith(")") else name
    wrapped = re.fullmatch(r"restkv::kernel::run_kernel<(.*)>", name)
    return re.sub(r"\brestkv::(?:kernel::)?(?:detail::)?", "", wrapped[1] if wrapped else name).strip()


def kernel_resources(text):
    """{(kernel, architecture): (registers, shared bytes, stack bytes, spilled bytes)} of a log of ptxas -v."""
    found = {}
    for block in re.split(r"Compiling entry function ", text)[1:]:
        symbol, arch = re.match(r"'([^']*)' for '([^']*)'", block).groups()
        stack, stores, loads = map(int, re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", block).groups())
        registers = int(re.search(r"Used (\d+) registers", block)[1])
        shared = re.search(r"(\d+) bytes smem", block)
        found[kernel_name(symbol), arch] = (registers, int(shared[1]) if shared else 0, stack, stores + loads)
    return found


def read_table(path):
    rows = [line.rsplit("\t", 3) for line in pathlib.Path(path).read_text().splitlines()[1:]]
    return {(name, arch): (int(registers), int(shared)) for name, arch, registers, shared in rows}


def check_cuda(args):
    result, text, dependencies = run_nvcc(args, args.source, ["-Xptxas", "-v"])
    if result.returncode != 0:
        print(text, file=sys.stderr)
        return 1, text, dependencies
    problems = []
    granted = read_table(args.resources) if args.resources else None
    for (kernel, arch), (registers, shared, stack, spilled) in sorted(kernel_resources(result.stdout).items()):
        if kernel.startswith(("thrust::", "cub::")):
            continue  # not ours
        if stack or spilled:
            problems.append(f"{kernel} for {arch}: {stack} bytes of local memory, {spilled} bytes spilled")
        if granted is None:
            continue
        if (kernel, arch) not in granted:
            problems.append(f"{kernel} for {arch} is not in {args.resources}: {registers} registers, {shared} bytes")
            continue
        most_registers, most_shared = granted[kernel, arch]
        if registers > most_registers or shared > most_shared:
            problems.append(f"{kernel} for {arch}: {registers} registers and {shared} bytes of shared memory, "
                            f"{most_registers} and {most_shared} are granted")
    return (1 if problems else 0), "\n".join(problems + [text]), dependencies


def check_device_header(args):
    with tempfile.TemporaryDirectory() as folder:
        source = os.path.join(folder, "header.cu")
        pathlib.Path(source).write_text(f"#include <{args.header}>\n#include <{args.header}>\n")
        result, text, dependencies = run_nvcc(args, source, [])
    return (1 if result.returncode != 0 else 0), text, [name for name in dependencies if os.path.exists(name)]


def write_resources(args):
    """The table, from what compilers said: the most of all sources that have a kernel."""
    table = {}
    for path in args.results:
        for key, (registers, shared, _, _) in kernel_resources(pathlib.Path(path).read_text()).items():
            if not key[0].startswith(("thrust::", "cub::")):
                before = table.get(key, (0, 0))
                table[key] = (max(registers, before[0]), max(shared, before[1]))
    lines = ["kernel\tarchitecture\tregisters\tshared bytes"]
    lines += [f"{kernel}\t{arch}\t{registers}\t{shared}" for (kernel, arch), (registers, shared) in sorted(table.items())]
    pathlib.Path(args.table).write_text("\n".join(lines) + "\n")
    return 0


def report(args):
    code, _, text = pathlib.Path(args.result).read_text().partition("\n")
    print(text)
    return int(code)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("std", "header", "reject", "cuda", "device_header"):
        sub = commands.add_parser(name)
        sub.add_argument("--output", required=True)
        sub.add_argument("--depfile")
        sub.add_argument("--root", action="append", default=[], help="an include root of the project")
        sub.add_argument("--flag", action="append", default=[], help="one more flag for the compiler")
        if name in ("header", "device_header"):
            sub.add_argument("--header", required=True, help="as written in an #include")
        if name == "header":
            sub.add_argument("--third-party", action="store_true")
            sub.add_argument("--std-files")
        if name in ("reject", "cuda"):
            sub.add_argument("--source", required=True)
        if name == "cuda":
            sub.add_argument("--resources", help="a table of registers and shared memory, see `resources`")
        if name in ("cuda", "device_header"):
            sub.add_argument("--arch", action="append", default=[])
        sub.add_argument("--compiler", nargs=argparse.REMAINDER, required=True,
                         help="the compiler's command; takes all further arguments")
    commands.add_parser("report").add_argument("result")
    resources = commands.add_parser("resources")
    resources.add_argument("table")
    resources.add_argument("results", nargs="+")
    args = parser.parse_args()

    if args.command == "report":
        return report(args)
    if args.command == "resources":
        return write_resources(args)
    checks = {"std": check_std, "header": check_header, "reject": check_reject, "cuda": check_cuda,
              "device_header": check_device_header}
    outcome = checks[args.command](args)
    if outcome is not None:
        code, text, files = outcome
        pathlib.Path(args.output).write_text(f"{code}\n{text}\n")
        if args.depfile:
            write_depfile(args.depfile, args.output, files)
    return 0


if __name__ == "__main__":
    sys.exit(main())
