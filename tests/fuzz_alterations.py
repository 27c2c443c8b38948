"""Alterations of files for fuzz_trials.py: each takes a random source and a path, and alters what lies there in place.

One may return the name under which the file goes on; what it leaves out by `Unfit` does not apply to the file at hand.
"""

import contextlib
import gzip
import io
import json
import os
import shutil
import socket
import struct
import tarfile
import warnings
import zipfile
import zlib

import numpy as np
import onnx
import torch
import yaml
from PIL import Image
from safetensors.numpy import load

from modiff_trt.core.files import HEADER_KEY, save_arrays, write_signed
from modiff_trt.core.manifest import DIGEST as ONNX_DIGEST
from modiff_trt.core.manifest import MANIFEST_KEY, content_digest


class Unfit(Exception):
    """The alteration does not apply to this file; another one is drawn."""


DEEP = "[" * 100_000 + "]" * 100_000
# Text that no JSON writer makes: it goes in as a word, which is replaced afterwards.
RAW = {"@nan@": "NaN", "@inf@": "-Infinity", "@1e999@": "1e999", "@digits@": "9" * 5000, "@deep@": DEEP, "@bare@": "tru"}
WORDS = ["", "8", "x" * 2000, "../../x", "\x1b[31m\nerror: two", "\ud800", "modiff", "quad", "0" * 64]
NUMBERS = [0, 1, -1, 2, 8, 9, 33, 255, 10**6, 2**31, 2**63, 10**30, -(10**30), 0.5, -0.0, 1e-320, 1e308, True]
VALUES = [None, [], {}, [8], {"a": 1}, [[]], [None], *WORDS, *NUMBERS]


def change_bytes(path, change):
    data = bytearray(path.read_bytes())
    if not data:
        raise Unfit
    path.write_bytes(bytes(change(data)))


def flip(chance, path, count=1):
    def change(data):
        for _ in range(count):
            # Headers are at either end: a third of the flips go there.
            span = chance.choice([len(data), len(data), min(256, len(data))])
            at = chance.randrange(span)
            data[chance.choice([at, len(data) - 1 - at])] ^= 1 << chance.randrange(8)
        return data

    change_bytes(path, change)


def zero(chance, path):
    def change(data):
        begin = chance.randrange(len(data))
        size = min(chance.choice([1, 16, 1000, len(data)]), len(data) - begin)
        return data[:begin] + bytes(size) + data[begin + size :]

    change_bytes(path, change)


def written(data):
    return lambda chance, path: path.write_bytes(data) and None


def truncate(chance, path):
    change_bytes(path, lambda data: data[: chance.choice([1, 8, len(data) - 1, chance.randrange(len(data))])])


def extend(chance, path):
    change_bytes(path, lambda data: data + chance.choice([b"\0", b"\n", chance.randbytes(100), bytes(data[:1000])]))


BYTES = {
    "one bit": flip,
    "some bits": lambda chance, path: flip(chance, path, chance.randint(2, 50)),
    "truncated": truncate,
    "extended": extend,
    "zeroed": zero,
    "empty": lambda chance, path: path.write_bytes(b"") and None,
    "random bytes": lambda chance, path: path.write_bytes(chance.randbytes(chance.choice([1, 100, 5000]))) and None,
    "text": written(b"this is\nno such file\n"),
    "JSON": written(b'{"schema": 1, "kind": "scales", "batches": {}, "sets": {}}'),
    "deep JSON": written(DEEP.encode()),
}


def special(make):
    def alter(chance, path):
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        make(path)

    return alter


def bind(path):
    before = os.getcwd()
    os.chdir(path.parent)  # a socket's address is short
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(path.name)
    os.chdir(before)


ENDLESS = ("/dev/zero", "/dev/full", "/proc/self/mem", "/")
SPECIAL = {
    "FIFO": special(os.mkfifo),
    "folder": special(os.mkdir),
    "link loop": special(lambda path: path.symlink_to(path.name)),
    "dangling link": special(lambda path: path.symlink_to("nowhere")),
    "absent": special(lambda path: None),
    "socket": special(bind),
    **{f"link to {to}": special(lambda path, to=to: path.symlink_to(to)) for to in ENDLESS},
}
NAMES = {
    "name not in UTF-8": lambda chance, path: str(path.rename(path.with_name(f"\udcff\udcfe{path.name}")).name),
    "name with a line end": lambda chance, path: str(path.rename(path.with_name(f"a\nb\x1b[1m{path.name}")).name),
    "name of 300 characters": lambda chance, path: "n" * 300 + path.name,
    "name of 100,000 characters": lambda chance, path: "n" * 100_000 + path.name,
    "folder that is a file": lambda chance, path: f"{path.name}/{path.name}",
}


# JSON, wherever it is kept: read(path) -> text, write(path, text).
def places(tree):
    found, open_ = [], [tree]
    while open_:
        node = open_.pop()
        for key in node if isinstance(node, dict) else range(len(node)):
            found.append((node, key))
            if isinstance(node[key], (dict, list)):
                open_.append(node[key])
    return found


def json_alterations(read, write, legal_only=False):
    """Alterations of one value of JSON text. `legal_only`: of values that Python's writer can write and sign again."""
    replacements = [*VALUES, float("nan"), float("inf")] if legal_only else [*VALUES, *RAW]

    def altered(change):
        def alter(chance, path):
            tree = json.loads(read(path))
            found = places(tree)
            if not found:
                raise Unfit
            # Few of the values stand near the top, and they matter most.
            top = [place for place in found if place[0] is tree]
            change(chance, *chance.choice(chance.choice([found, top])))
            text = json.dumps(tree)
            for word, raw in RAW.items():
                text = text.replace(f'"{word}"', raw)
            write(path, text.replace("@twice@", ""))

        return alter

    def value(chance, node, key):
        node[key] = chance.choice(replacements)

    def near(chance, node, key):
        old = node[key]
        if isinstance(old, bool) or old is None:
            node[key] = not old
        elif isinstance(old, (int, float)):
            node[key] = chance.choice([old + 1, old - 1, -old, old * 2, float(old), str(old), [old]])
        elif isinstance(old, str):
            node[key] = chance.choice([old[1:], old + "x", old.upper(), [old], old[::-1]])
        else:
            node[key] = chance.choice([[*old, "x"] if isinstance(old, list) else {**old, "x": 1}, type(old)(), [old]])

    def delete(chance, node, key):
        del node[key]

    def extra(chance, node, key):
        if isinstance(node, dict):
            node[f"{key}@twice@"] = chance.choice(replacements)
        else:
            node.append(node[key])

    def whole(chance, path):
        write(path, chance.choice(["[]", "null", "1", '"x"', "{}", *([] if legal_only else [DEEP, "NaN", "", "{"])]))

    kinds = {"value": altered(value), "near value": altered(near), "key gone": altered(delete), "whole": whole}
    return kinds if legal_only else {**kinds, "key twice": altered(extra)}


def named(prefix, alterations):
    return {f"{prefix}: {name}": alter for name, alter in alterations.items()}


def parts(path):
    """(header as JSON text, the rest) of a safetensors file."""
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    return data[8 : 8 + size].decode(), data[8 + size :]


def join(path, header, rest):
    data = header.encode("utf-8", "surrogatepass")
    path.write_bytes(struct.pack("<Q", len(data)) + data + rest)


def inner_write(path, text):
    outer, rest = parts(path)
    tree = json.loads(outer)
    tree["__metadata__"][HEADER_KEY] = text
    join(path, json.dumps(tree), rest)


def inner_read(path):
    return json.loads(parts(path)[0])["__metadata__"][HEADER_KEY]


def sign_arrays(path, text):
    header = json.loads(text)
    if not isinstance(header, dict):
        raise Unfit
    header.pop("sha256", None)
    save_arrays(path, header, load(path.read_bytes()))


def sign_json(path, text):
    tree = json.loads(text)
    if not isinstance(tree, dict):
        raise Unfit
    with open(path, "w") as file:
        try:
            write_signed(path, tree)
        except ValueError:  # not a number: our writer does not write it
            from modiff_trt.core.files import signed

            json.dump(signed(tree), file)


def onnx_read(path):
    return next(p.value for p in onnx.load(path).metadata_props if p.key == MANIFEST_KEY)


def onnx_write(path, text, sign=False):
    model = onnx.load(path)
    if sign:
        tree = json.loads(text)
        if not isinstance(tree, dict):
            raise Unfit
        text = json.dumps({**tree, ONNX_DIGEST: content_digest(model, tree)})
    next(p for p in model.metadata_props if p.key == MANIFEST_KEY).value = text
    path.write_bytes(model.SerializeToString())


def npz_write(path, text, key="manifest"):
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **{**arrays, key: np.asarray(text)})


def npz_read(path):
    with np.load(path) as file:
        return str(file["manifest"])


def read(path):
    return path.read_text()


def write(path, text):
    path.write_bytes(text.encode("utf-8", "surrogatepass"))


JSON = named("JSON", json_alterations(read, write))
SIGNED_JSON = JSON | named("re-signed", json_alterations(read, sign_json, True))
OUTER = named("safetensors header", json_alterations(lambda path: parts(path)[0], lambda p, text: join(p, text, parts(p)[1])))
INNER = named("our header", json_alterations(inner_read, inner_write))
RESIGNED = named("re-signed", json_alterations(inner_read, sign_arrays, True))
ONNX = named("manifest", json_alterations(onnx_read, onnx_write))
ONNX |= named("re-signed", json_alterations(onnx_read, lambda path, text: onnx_write(path, text, True), True))
NPZ_MANIFEST = named("manifest", json_alterations(npz_read, npz_write))

ARRAYS = {
    "other type": lambda a: a.astype(np.float64 if a.dtype != np.float64 else np.int32),
    "flat": lambda a: a.reshape(-1),
    "none": lambda a: a[:0],
    "longer": lambda a: np.concatenate([a, a]),
    "NaN": lambda a: np.full_like(a, np.nan) if a.dtype.kind == "f" else -a - 1,
    "infinite": lambda a: np.full_like(a, np.inf) if a.dtype.kind == "f" else np.full_like(a, np.iinfo(a.dtype).max),
    "zero": lambda a: np.zeros_like(a),
    "negative": lambda a: -a,
    "tiny": lambda a: a * a.dtype.type(1e-30),
    "huge": lambda a: np.full_like(a, 1e38) if a.dtype.kind == "f" else a * 2,
    "other dimension": lambda a: a[None],
}


def resigned_array(change):
    def alter(chance, path):
        header = json.loads(inner_read(path))
        header.pop("sha256")
        arrays = load(path.read_bytes())
        name = chance.choice(sorted(arrays))
        with np.errstate(all="ignore"):
            arrays[name] = change(arrays[name])
        save_arrays(path, header, arrays)

    return alter


def resigned_names(chance, path):
    header, arrays = json.loads(inner_read(path)), load(path.read_bytes())
    header.pop("sha256")
    value = arrays.pop(chance.choice(sorted(arrays)))
    save_arrays(path, header, arrays | chance.choice([{}, {"extra": value}]))


RESIGNED |= {f"re-signed array: {name}": resigned_array(change) for name, change in ARRAYS.items()}
RESIGNED["re-signed array: gone"] = resigned_names


# .npy and .npz
def npy(descr="'<f4'", shape="(2, 3, 12, 12)", fortran="False", data=b"", header=None, version=(1, 0)):
    text = (header or f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}").encode("latin1")
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    size = struct.pack("<H" if version[0] == 1 else "<I", len(text) & 0xFFFF if version[0] == 1 else len(text))
    return b"\x93NUMPY" + bytes(version) + size + text + data


SHAPES = (
    "(-2, 3)",
    "(10**12, 3)",
    "(1000000000000, 3, 12, 12)",
    "(2, 3.0)",
    "(True, 2)",
    "2",
    "()",
    "(0,)",
    "(2, 3, 12, 12, 1)",
)
DESCRS = ("'|O'", "'<f2'", "'>f4'", "'<c8'", "'<U5'", "'|V16'", "[('a', '<f4'), ('b', '|O')]", "'<f4,<f4'", "'x'", "5")
HEADERS = ("{", "(" * 3000, "{'a': 1}", "[]", "__import__('os')", "{'descr': '<f4', 'fortran_order': 1, 'shape': (1,)}")
NPY_BYTES = {
    **{f"shape {shape}": npy(shape=shape, data=bytes(3456)) for shape in SHAPES},
    **{f"type {descr}": npy(descr=descr, data=bytes(3456)) for descr in DESCRS},
    **{f"header {header[:20]}": npy(header=header, data=bytes(100)) for header in HEADERS},
    "Fortran order": npy(fortran="True", data=bytes(3456)),
    **{f"version {v}": npy(version=(v, 0), data=bytes(3456)) for v in (0, 2, 3, 9)},
    "header of 4 GB": b"\x93NUMPY\x02\x00\xff\xff\xff\xff{'descr'",
    "pickled": b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94\x93.",
}
NPY = {f"npy {name}": written(data) for name, data in NPY_BYTES.items()}


def saved(change):
    """The array in a .npy, changed."""

    def alter(chance, path):
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            np.save(path, change(np.load(path)))

    return alter


NPY |= {f"array {name}": saved(change) for name, change in ARRAYS.items()}
NPY["array as objects"] = lambda chance, path: np.save(path, np.load(path).astype(object), allow_pickle=True)


def members(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def pack(path, files, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, data in files:
            archive.writestr(name, data)


def npz_member(data):
    def alter(chance, path):
        files = members(path)
        pack(path, (files | {chance.choice(sorted(files)): data}).items(), zipfile.ZIP_DEFLATED)

    return alter


def npz_array(change):
    def alter(chance, path):
        files = members(path)
        name = chance.choice(sorted(files))
        array, out = np.load(io.BytesIO(files[name])), io.BytesIO()
        if array.dtype.kind not in "fiu" or array.ndim == 0:
            raise Unfit
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            np.save(out, change(array))
        pack(path, (files | {name: out.getvalue()}).items(), zipfile.ZIP_DEFLATED)

    return alter


def npz_repacked(chance, path):
    files = list(members(path).items())
    chance.choice([lambda: files.append(files[0]), lambda: files.pop(chance.randrange(len(files))), files.reverse])()
    pack(path, files, chance.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]))


def zip_field(offset, value):
    """Writes a field of the first central directory entry: method, flags, sizes."""

    def alter(chance, path):
        data = bytearray(path.read_bytes())
        at = data.find(b"PK\x01\x02")
        if at < 0:
            raise Unfit
        data[at + offset : at + offset + len(value)] = value
        path.write_bytes(bytes(data))

    return alter


ZIP = {
    "zip: encrypted": zip_field(8, b"\x01\0"),
    "zip: method 99": zip_field(10, b"\x63\0"),
    "zip: date 0": zip_field(12, bytes(4)),
    "zip: checksum": zip_field(16, b"abcd"),
    "zip: sizes of 4 GB": zip_field(20, b"\xfe\xff\xff\xff" * 2),
    "zip: offset": zip_field(42, b"\x01\0\0\x7f"),
}
NPZ = ZIP | {f"npz member: npy {name}": npz_member(data) for name, data in NPY_BYTES.items()}
NPZ |= {f"npz array {name}": npz_array(change) for name, change in ARRAYS.items()}
NPZ["npz repacked"] = npz_repacked


# Archives of CIFAR-10
def tarred(*entries, tail=b""):
    """entries: (name, type, data, link)."""

    def alter(chance, path):
        with gzip.open(path) as unpacked, tarfile.open(fileobj=unpacked) as archive:
            old = [(m, archive.extractfile(m).read()) for m in archive if m.isreg()]
        with gzip.open(path, "wb", 1) as packed:
            with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive:
                for member, data in old[1:] if entries else old:
                    archive.addfile(member, io.BytesIO(data))
                for name, kind, data, link in entries:
                    member = tarfile.TarInfo(name)
                    member.type, member.size, member.linkname = kind, len(data), link
                    archive.addfile(member, io.BytesIO(data))
            packed.write(tail)

    return alter


FIRST = "cifar-10-batches-bin/data_batch_1.bin"
TAR = {
    "tar: symbolic link": tarred((FIRST, tarfile.SYMTYPE, b"", "/etc/passwd")),
    "tar: hard link": tarred((FIRST, tarfile.LNKTYPE, b"", "cifar-10-batches-bin/data_batch_2.bin")),
    "tar: link to itself": tarred((FIRST, tarfile.LNKTYPE, b"", FIRST)),
    "tar: folder": tarred((FIRST, tarfile.DIRTYPE, b"", "")),
    "tar: FIFO": tarred((FIRST, tarfile.FIFOTYPE, b"", "")),
    "tar: device": tarred((FIRST, tarfile.CHRTYPE, b"", "")),
    "tar: sparse": tarred((FIRST, tarfile.GNUTYPE_SPARSE, b"x" * 3073, "")),
    "tar: unknown type": tarred((FIRST, b"Z", b"", "")),
    "tar: empty member": tarred((FIRST, tarfile.REGTYPE, b"", "")),
    "tar: half a record": tarred((FIRST, tarfile.REGTYPE, bytes(1000), "")),
    "tar: label 99": tarred((FIRST, tarfile.REGTYPE, b"\x63" * 3073, "")),
    "tar: member above": tarred(("../../data_batch_9.bin", tarfile.REGTYPE, bytes(3073), "")),
    "tar: name with a line end": tarred(("a\nb/data_batch_9\x1b.bin", tarfile.REGTYPE, bytes(1000), "")),
    "tar: more after the end": tarred(tail=bytes(5000)),
    "tar: damaged PAX header": tarred(("pax", tarfile.XHDTYPE, b"99999 size=-5\n", "")),
    "tar: huge PAX size": tarred(("pax", tarfile.XHDTYPE, b"22 size=99999999999999\n", "")),
    "gzip bomb": lambda chance, path: path.write_bytes(gzip.compress(bytes(1 << 26), 1)) and None,
    "not gzipped": lambda chance, path: path.write_bytes(gzip.decompress(path.read_bytes())) and None,
}


# YAML
YAML_VALUES = [
    *('!!int ""', "!!bool maybe", "!!timestamp foo", "!!float x", "!!binary x", "!!python/object:os.system {}", "!!set 3"),
    *("9" * 5000, "1e999", "-.inf", ".nan", "0x" + "f" * 400, "1_000", "0o17", "190:20:30", "2001-01-01", "~", "yes", "''"),
    *("1000000000", "-1", "0", "[1, [2]]", "{a: 1}", "'8'", "8.0", "1e-8", "&a [*a]", "*nothing", "[" * 3000, "{? [1]: 2}"),
    *("!unknown 3", "|\n  a", "\u2028", "\x85", "'\\ud800'", '"\\x00"', "x" * 5000, "[1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"),
]


def yaml_value(chance, path):
    lines = path.read_text().splitlines()
    at = chance.choice([i for i, line in enumerate(lines) if line.startswith(" ")])
    lines[at] = f"{lines[at].split(':')[0]}: {chance.choice(YAML_VALUES)}"
    write(path, "\n".join(lines))


def yaml_near(chance, path):
    tree = yaml.safe_load(path.read_text())
    section = tree[chance.choice(sorted(tree))]
    key = chance.choice(sorted(section))
    old = section[key]
    near = {bool: [not old], int: [old] if not isinstance(old, int) else [old + 1, old * 2, old - 1, -old, 10**9]}
    section[key] = chance.choice([*near.get(type(old), [old, str(old)]), None, [old], float("nan"), "quad"])
    path.write_text(yaml.safe_dump(tree))


def yaml_lines(chance, path):
    lines = path.read_text().splitlines()
    at = chance.randrange(len(lines))
    new = ["model: 3", "  sampler: ddpm", "? [a]", "- 1", "\tx: 1", "%YAML 9.9", "---", "...", "extra: {eta: 1}", "1: 2"]
    lines[at : at + chance.randint(0, 1)] = [chance.choice([*new, "<<: {a: 1}", lines[at]])]
    path.write_text("\n".join(lines))


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
YAML = {
    "YAML value": yaml_value,
    "YAML near value": yaml_near,
    "YAML lines": yaml_lines,
    "YAML aliases": lambda chance, path: path.write_text(BOMB + path.read_text()) and None,
    "YAML in UTF-16": lambda chance, path: path.write_bytes(path.read_text().encode("utf-16")) and None,
    "YAML in Latin-1": lambda chance, path: path.write_bytes(b"# \xe9\n" + path.read_bytes()) and None,
}


# torch files
TENSORS = {
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "bfloat16": lambda t: t.bfloat16(),
    "float64": lambda t: t.double(),
    "complex": lambda t: t.to(torch.complex64),
    "conjugate": lambda t: t.to(torch.complex64).conj(),
    "int64": lambda t: t.long(),
    "bool": lambda t: t.bool(),
    "sparse": lambda t: t.to_sparse(),
    "CSR": lambda t: t.reshape(len(t), -1).to_sparse_csr(),
    "nested": lambda t: torch.nested.nested_tensor([t.reshape(-1)[:3], t.reshape(-1)]),
    "jagged": lambda t: torch.nested.nested_tensor([t.reshape(-1)[:3], t.reshape(-1)], layout=torch.jagged),
    "requires_grad": lambda t: t.clone().requires_grad_(),
    "parameter": lambda t: torch.nn.Parameter(t),
    "negative view": lambda t: torch._neg_view(-t),
    "meta": lambda t: t.to("meta"),
    "quantized": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "broadcast": lambda t: t.reshape(-1)[:1].expand(t.numel()).reshape(t.shape),
    "transposed": lambda t: t.mT.contiguous().mT if t.ndim > 1 else t.flip(0),
    "NaN": lambda t: t * float("nan"),
    "large float64": lambda t: t.double() * 1e300,
    "no tensor": lambda t: t.reshape(-1)[:5].tolist(),
    "empty": lambda t: t[:0],
    "other shape": lambda t: t[None],
}


def deepest(content):
    """The state dict inside a torch file's content."""
    while True:
        values = list(content.values()) if isinstance(content, dict) else list(content)
        if isinstance(content, dict) and any(isinstance(v, torch.Tensor) for v in values):
            return content
        content = next(v for v in reversed(values) if isinstance(v, (dict, list)) and v)


def torch_tensor(change):
    def alter(chance, path):
        content = torch.load(path, weights_only=True)
        state = deepest(content)
        key = chance.choice(sorted(state))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                state[key] = change(state[key])
                torch.save(content, path)
            except (RuntimeError, NotImplementedError):
                raise Unfit from None

    return alter


def torch_content(chance, path):
    content = torch.load(path, weights_only=True)
    state = deepest(content)
    loop = []
    loop.append(loop)
    weird = [[], {}, None, 5, "x", state["conv_in.weight"], [state], {"a": {"b": {"c": state}}}, {1: state}, loop, {"x": loop}]
    weird += [{**state, 5: state["conv_in.weight"]}, {**state, "": 1}, {f"module.{k}": v for k, v in state.items()}]
    weird += [{"ema": {}, "state_dict": state}, {"ema": None, "model": state}, [state, None, 1, 2, None], (state,)]
    weird += [{k: v for k, v in state.items() if k != "conv_in.bias"}, {**state, "x" * 5000 + "\n": state["conv_in.bias"]}]
    torch.save(chance.choice(weird), path)


def torch_old(chance, path):
    torch.save(torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=False)


def torch_object(chance, path):
    torch.save({"model": chance.choice([torch.nn.Linear(1, 1), os.system, slice(1, 2), np.float64(1), np.zeros(3)])}, path)


TORCH = ZIP | {f"tensor {name}": torch_tensor(change) for name, change in TENSORS.items()}
TORCH |= {"content": torch_content, "old format": torch_old, "object": torch_object, "zip repacked": npz_repacked}


def safetensors_type(chance, path):
    tree, rest = json.loads(parts(path)[0]), parts(path)[1]
    entry = tree[chance.choice(sorted(key for key in tree if key != "__metadata__"))]
    begin, end = entry["data_offsets"]
    sizes = {"F8_E4M3": 1, "F8_E5M2": 1, "I32": 4, "U8": 1, "BOOL": 1, "F64": 8, "F4": 1, "C64": 8}
    new, size = chance.choice(list(sizes.items()))
    entry["dtype"] = new
    if (end - begin) % size == 0:
        entry["shape"] = [(end - begin) // size]
    join(path, json.dumps(tree), rest)


SAFETENSORS = OUTER | {"safetensors type": safetensors_type}


# Pictures
def picture(suffix, mode="RGB", size=(12, 12), **options):
    def alter(chance, path):
        new = path.with_suffix(suffix)
        path.unlink()
        try:
            Image.frombytes("RGB", size, chance.randbytes(3 * size[0] * size[1])).convert(mode).save(new, **options)
        except (OSError, ValueError, KeyError):
            raise Unfit from None

    return alter


def bomb(chance, path):
    """A PNG header of 60,000 x 60,000 pixels."""
    data = bytearray(path.read_bytes())
    if data[:4] != b"\x89PNG":
        raise Unfit
    data[16:24] = struct.pack(">II", 60_000, 60_000)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    path.write_bytes(bytes(data))


MODES = ("1", "L", "P", "RGBA", "I", "F", "LA", "CMYK", "I;16")
FORMATS = (".jpg", ".bmp", ".webp", ".gif", ".PNG", ".jpeg", ".ppm", ".pgm", ".eps")


def renamed(chance, path):
    path.rename(path.with_suffix(chance.choice([".bmp", ".webp", ".tif", ".txt", ""])))


PICTURES = {
    **{f"picture {mode} {suffix}": picture(suffix, mode) for suffix in (".png", ".tiff") for mode in MODES},
    **{f"picture {suffix}": picture(suffix) for suffix in FORMATS},
    "picture of another size": picture(".png", size=(13, 12)),
    "picture of one pixel": picture(".png", size=(1, 1)),
    "several frames": picture(".webp", save_all=True, append_images=[Image.new("RGB", (12, 12))]),
    "decompression bomb": bomb,
    "wrong suffix": renamed,
}
