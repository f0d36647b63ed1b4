"""The catalogue of bad input: every case, how it comes about, and the exit code and message that are promised."""

import functools
import json
import os
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
from depth_files import exr, npy, npy_head, npz, pfm, windows, zipped
from PIL import Image

from torture import disks
from torture.catalogue import DEPTHS, GUIDES, HIGH, LOW, METRES, MILLIMETRES, PICTURE, UPSAMPLE, Case, pillow, tiff
from torture.surroundings import short_memory, unprivileged, without_gpu


def png_head(width, height, bits=16, colour=0, body=b""):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def tiff_head(width, height, *, following=0, tile=0):
    """A 16-bit TIFF of one value, by hand; ``following``: offset of the next directory."""
    entries = {256: width, 257: height, 258: 16, 259: 1, 262: 1, 277: 1}
    size = min(2 * width * height, 2000)
    entries |= {322: tile, 323: tile, 324: 200, 325: size} if tile else {273: 200, 278: height, 279: size}
    body = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(entries.items()))
    start = struct.pack("<4sIH", b"II*\0", 8, len(entries)) + body + struct.pack("<I", following)
    return start.ljust(200, b"\0") + b"\1\2" * (size // 2)


def flipped(data, at=0.5):
    place = int(at * (len(data) - 1))
    return data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :]


def put(name, data):
    """Return what writes a file; one of another name stands for the good one."""

    def prepare(folder):
        if name.startswith(("guide", "depth")):
            (folder / ("guide.jpg" if name.startswith("guide") else "depth.png")).unlink()
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data())

    return prepare


def depth(group, name, file, data, message, code=4):
    """A depth file that is bad (or, with code 0, is not)."""
    made = (str(Path(file).with_name(Path(file).stem + "_up" + Path(file).suffix)),) if code == 0 else ()
    return Case(group, name, code, message, file, put(file, data), ("upsample", file, "guide.jpg"), made=made)


def guide(group, name, file, data, message, code=4):
    """A guide that is bad (or, with code 0, is not)."""
    made = ("depth_up.png",) if code == 0 else ()
    return Case(group, name, code, message, file, put(file, data), ("upsample", "depth.png", file), made=made)


def _decode():
    for kind, data in DEPTHS.items():
        upper, file = {"tif": "TIFF"}.get(kind, kind.upper()), f"depth.{kind}"
        yield depth("decode", f"{kind} empty", file, b"", "must not be empty; got 0 bytes")
        yield depth("decode", f"{kind} cut at 0.1 %", file, data[:1], f"is not {upper} by its content")
        for share in (0.1, 0.5, 0.999):
            cut = data[: int(share * len(data))]
            yield depth("decode", f"{kind} cut at {share:.1%}", file, cut, "must be a whole " + upper)
        other = "npy" if kind != "npy" else "png"
        yield depth("decode", f"{other} called {kind}", file, DEPTHS[other], f"is not {upper} by its content but")
    # Pixels that do not shrink are stored as they are, and a flipped one is as good as another.
    shrinks = exr({"Z": np.where(np.arange(48).reshape(LOW) % 2, 1, 2).astype(np.float32)})
    yield depth("decode", "exr with a flipped byte", "depth.exr", flipped(shrinks, 0.97), "must be a whole EXR file")
    for kind in ("png", "npz", "tif"):
        yield depth(
            "decode", f"{kind} with a flipped byte", f"depth.{kind}", flipped(DEPTHS[kind], 0.8), "must be a whole"
        )
    for kind in ("npy", "pfm"):
        yield depth(
            "decode", f"{kind} with a flipped byte", f"depth.{kind}", flipped(DEPTHS[kind], 0.03), "must be a whole"
        )
    for kind, data in GUIDES.items():
        yield guide("decode", f"guide {kind} empty", f"guide.{kind}", b"", "must not be empty; got 0 bytes")
        for share in (0.1, 0.5, 0.999):
            cut = data[: int(share * len(data))]
            yield guide("decode", f"guide {kind} cut at {share:.1%}", f"guide.{kind}", cut, "must be a whole")
    for kind in ("png", "tif", "exr"):
        yield guide(
            "decode",
            f"guide {kind} with a flipped byte",
            f"guide.{kind}",
            flipped(GUIDES[kind], 0.8),
            "must be a whole",
        )
    yield guide("decode", "guide is text", "guide.jpg", b"hello", "its content is none of them")
    yield guide("decode", "guide is PNG called jpg", "guide.jpg", GUIDES["png"], "", 0)
    for name in ("depth.png", "guide.jpg"):
        short = name.partition(".")[0]

        def remake(make, name=name):
            def prepare(folder):
                (folder / name).unlink()
                make(folder / name)

            return prepare

        def case(what, make, message, name=name, remake=remake):
            return Case("decode", what, 4, message, name, remake(make))

        yield case(f"{short} is a FIFO", os.mkfifo, "must be a file; got a device or pipe")
        yield case(f"{short} is a folder", Path.mkdir, "must be a file; got a folder")
        yield case(f"{short} is missing", lambda path: None, "must exist; there is no such file")
        yield case(f"{short} is a link to nowhere", lambda path: path.symlink_to("none.png"), "must exist; there is no")
        yield case(f"{short} is a link to itself", lambda path, n=name: path.symlink_to(n), "must be readable; got")
        if Path("/proc/self/mem").exists():
            yield case(
                f"{short} cannot be read (EIO)", lambda path: path.symlink_to("/proc/self/mem"), "Input/output error"
            )
        yield Case(
            "decode",
            f"{short} is another user's",
            4,
            "must be readable; got Permission denied",
            name,
            lambda folder, name=name: (folder / name).chmod(0),
            around=unprivileged,
        )


@functools.cache
def _zeros():
    return zipped({"depth.npy": npy_head("(5000, 5000)") + bytes(100_000_000)})


@functools.cache
def _black():
    return png_head(6000, 6000, body=zlib.compress((b"\0" + bytes(12000)) * 6000))


def _bombs():
    size = "must have at most 200000000 pixels; got 200000x200000"
    yield depth("bombs", "png of 200000x200000", "depth.png", png_head(200000, 200000), size)
    yield depth("bombs", "tif of 200000x200000", "depth.tif", tiff_head(200000, 200000), size)
    window = (0, 0, 199999, 199999)
    yield depth("bombs", "exr of 200000x200000", "depth.exr", windows(DEPTHS["exr"], stored=window, shown=window), size)
    hidden = windows(DEPTHS["exr"], stored=window)
    yield depth(
        "bombs", "exr with a hidden 200000x200000", "depth.exr", hidden, "stored pixels must be near the picture's"
    )
    yield depth(
        "bombs", "npy of 200000x200000", "depth.npy", npy_head("(200000, 200000)"), "must be a whole NPY file of"
    )
    yield depth("bombs", "pfm of 200000x200000", "depth.pfm", b"Pf\n200000 200000\n-1\n", "must be a whole PFM file of")
    yield depth(
        "bombs",
        "npz of 1000:1",
        "depth.npz",
        _zeros,
        "must not shrink more than 300:1",
    )
    yield depth("bombs", "png of 1000:1", "depth.png", _black, "must not shrink more than 300:1")
    strip = struct.pack("<HHII", 279, 4, 1, 96)
    greedy = tiff_head(8, 6).replace(strip, struct.pack("<HHII", 279, 4, 1, 1 << 31))
    yield depth("bombs", "tif whose strip claims 2 GB", "depth.tif", greedy, "a part of it has 2147483648 bytes")
    lying = zipped({"depth.npy": npy_head("(200000, 200000)")})
    yield depth(
        "bombs", "npz with a lying header", "depth.npz", lying, "its array must have 160000000128 bytes; got 128"
    )
    yield depth("bombs", "tif with huge tiles", "depth.tif", tiff_head(16, 16, tile=1 << 20), "tiles must be near")
    yield depth("bombs", "tif whose directories go in a circle", "depth.tif", tiff_head(8, 6, following=8), "", 0)
    for kind in ("png", "tif", "exr"):
        data = {
            "png": png_head(200000, 200000, 8, 2),
            "tif": tiff_head(200000, 200000),
            "exr": windows(GUIDES["exr"], stored=window, shown=window),
        }[kind]
        yield guide("bombs", f"guide {kind} of 200000x200000", f"guide.{kind}", data, size)
    at = GUIDES["jpg"].index(b"\xff\xc0") + 5
    jpeg = GUIDES["jpg"][:at] + struct.pack(">HH", 65500, 65500) + GUIDES["jpg"][at + 4 :]
    yield guide("bombs", "guide jpg of 65500x65500", "guide.jpg", jpeg, "at most 200000000 pixels; got 65500x65500")
    few = (*UPSAMPLE, "--max-pixels", "700")
    yield Case(
        "bombs", "--max-pixels 700", 4, "must have at most 700 pixels; got 32x24 = 768", "guide.jpg", arguments=few
    )


def _types():
    colours = Image.fromarray(PICTURE).resize(LOW[::-1])
    one = "depth must have one channel; got "
    yield depth("type", "png of 3 channels", "depth.png", pillow(colours, "PNG"), one + "3 channels (RGB)")
    yield depth("type", "png of 4 channels", "depth.png", pillow(colours.convert("RGBA"), "PNG"), one + "4 channels")
    yield depth("type", "png with a palette", "depth.png", pillow(colours.convert("P"), "PNG"), one + "a palette")
    yield depth(
        "type", "png of 8 bits", "depth.png", pillow(colours.convert("L"), "PNG"), "8-bit depth has no usual unit"
    )
    yield depth(
        "type", "png of 1 bit", "depth.png", pillow(colours.convert("1"), "PNG"), "must have 16 bits per pixel; got 1"
    )
    yield depth(
        "type", "tif of 3 channels", "depth.tif", tiff(np.asarray(colours), photometric="rgb"), one + "3 channels"
    )
    rainbow = exr({"RGB": np.stack([METRES, METRES, METRES + 1], -1)})
    yield depth("type", "exr of colours", "depth.exr", rainbow, one + "different R, G, B")
    yield depth("type", "exr of two layers", "depth.exr", exr({"a.Z": METRES, "b.Z": METRES}), "must be in channel Z")
    yield depth(
        "type", "pfm of 3 channels", "depth.pfm", pfm(METRES, kind=b"PF"), one.replace("; got ", " (Pf); got 3")
    )
    numbers = "depth values must be integers or floats of up to 64 bits; got "
    yield depth("type", "npy of complex numbers", "depth.npy", npy(METRES.astype(complex)), numbers + "complex128")
    yield depth("type", "npy of truth values", "depth.npy", npy(METRES > 2), numbers + "bool")
    yield depth("type", "npy of texts", "depth.npy", npy(METRES.astype(str)), numbers)
    yield depth(
        "type",
        "npy of 3 dimensions",
        "depth.npy",
        npy(np.stack([METRES] * 2)),
        "must have 2 dimensions (rows, columns)",
    )
    yield depth("type", "npy of 1 dimension", "depth.npy", npy(METRES[0]), "must have 2 dimensions (rows, columns)")
    objects = npy(np.array([[{}]]), allow_pickle=True)
    yield depth("type", "npy of objects", "depth.npy", objects, "pickled objects are never loaded")
    yield depth(
        "type", "npz of objects", "depth.npz", zipped({"depth.npy": objects}), "pickled objects are never loaded"
    )
    yield depth(
        "type", "npz without keys", "depth.npz", zipped({}), "must have the key 'depth' or one array; got no array"
    )
    yield depth(
        "type", "npz of many keys", "depth.npz", npz(a=METRES, b=METRES), "must have the key 'depth' or one array"
    )
    yield depth("type", "depth is a JPEG", "depth.jpg", GUIDES["jpg"], "depth must be one of .png, .tif")
    yield depth("type", "depth without suffix", "depth", DEPTHS["png"], "depth must be one of .png, .tif")
    yield guide("type", "guide is float depth", "guide.tif", tiff(np.zeros(HIGH, np.float32)), "must have 8 or 16 bits")
    yield guide(
        "type", "guide is an EXR depth", "guide.exr", exr({"Z": np.ones(HIGH, np.float32)}), "R, G and B, or Y; got Z"
    )


def _values():
    none = "has no valid pixel: all 48 values mean no measurement"
    yield depth("values", "all zero", "depth.png", pillow(MILLIMETRES * 0, "PNG"), none)
    yield depth("values", "all NaN", "depth.npy", npy(METRES * np.nan), none)
    yield depth("values", "all infinite", "depth.exr", exr({"Z": METRES * np.inf}), none)
    yield depth("values", "all negative", "depth.tif", tiff(-METRES), none)
    yield depth("values", "beyond float32", "depth.npy", npy(np.full(LOW, 1e300)), "depth must fit float32; got 1e+300")
    one = np.where(np.arange(48).reshape(LOW) == 20, METRES, np.nan)
    yield depth("values", "one valid pixel", "depth.tif", tiff(one.astype(np.float32)), "", 0)
    mixed = np.where(np.arange(48).reshape(LOW) % 2, METRES, -np.inf).astype(np.float32)
    yield depth("values", "half of it infinite", "depth.pfm", pfm(mixed), "", 0)
    far = "depth stored as uint16 in mm must be at most 65.535 m; got 70 m"
    arguments = ("upsample", "depth.npy", "guide.jpg", "--format", "png")
    yield Case(
        "values", "70 m into 16-bit millimetres", 4, far, "depth.npy", put("depth.npy", npy(METRES * 14)), arguments
    )


def _sizes():
    def both(name, low, high, code=0, message=""):
        def prepare(folder):
            Image.fromarray(np.full(low[::-1], 1500, np.uint16)).save(folder / "depth.png")
            Image.new("RGB", high).save(folder / "guide.jpg")

        return Case("size", name, code, message, "depth.png", prepare, made=("depth_up.png",) if code == 0 else ())

    yield both("1x1 depth", (1, 1), (32, 24))
    yield both("1x1 depth and guide", (1, 1), (1, 1))
    yield both("9x1 depth", (9, 1), (90, 10))
    yield both("1x7 depth", (1, 7), (5, 35))
    yield both("ratio 7.5", (16, 12), (120, 90))
    yield both("ratio 1", (32, 24), (32, 24))
    same = "depth and guide must show the same view (aspect within 1 %)"
    yield both("aspect off", (80, 60), (192, 108), 4, same)
    yield both("depth turned by 90 degrees", (60, 80), (320, 240), 4, same)
    yield both("depth larger than guide", (64, 48), (32, 24), 4, "depth must not be larger than its guide")
    exif = Image.Exif()
    exif[274] = 6
    turned = pillow(np.rot90(PICTURE).copy(), "JPEG", exif=exif)
    yield guide("size", "guide turned by EXIF", "guide.jpg", turned, "", 0)
    wrong = pillow(PICTURE, "JPEG", exif=exif)
    yield guide("size", "guide turned wrongly by EXIF", "guide.jpg", wrong, same)


def _paths():
    for what, name in (
        ("unicode", "tiefe ümläut 深度.png"),
        ("spaces and brackets", "a [b] {c} (d).png"),
        ("a line break", "a\nb.png"),
        ("a quote and a tag", "'\"<b>.png"),
        ("bytes that are no UTF-8", os.fsdecode(b"a\xff\xfe.png")),
    ):
        yield replace(depth("paths", f"name with {what}", name, DEPTHS["png"], "", 0), prepare=put(name, DEPTHS["png"]))
    for kind in ("exr", "tif", "npz", "npy", "pfm"):
        odd = os.fsdecode(b"a\xff.") + kind
        yield replace(
            depth("paths", f"{kind} with such a name", odd, DEPTHS[kind], "", 0), prepare=put(odd, DEPTHS[kind])
        )
    dash = depth("paths", "name with a leading -", "-d.png", DEPTHS["png"], "", 0)
    yield replace(dash, arguments=("upsample", "--", "-d.png", "guide.jpg"))
    yield replace(
        dash,
        name="the same without --",
        code=2,
        message="No such option",
        names="-d",
        made=(),
        arguments=("upsample", "-d.png", "guide.jpg"),
    )
    long = "x" * 300 + ".png"
    yield Case(
        "paths", "name of 300 characters", 4, "must be readable", "xxx", arguments=("upsample", long, "guide.jpg")
    )

    def scene(folder):
        for name in ("depths", "guides"):
            (folder / name).mkdir()
        (folder / "depth.png").rename(folder / "depths/a.png")
        (folder / "guide.jpg").rename(folder / "guides/a.jpg")

    def twins(folder):
        scene(folder)
        (folder / "guides/a.png").write_bytes(GUIDES["png"])

    def circle(folder):
        scene(folder)
        (folder / "depths/again").symlink_to("..")
        (folder / "guides/again").symlink_to(".")

    batch = ("batch", "depths", "guides", "out")
    yield Case("paths", "batch: two guides of one stem", 5, "has 2 guides", "depths/a.png", twins, batch)
    yield Case(
        "paths", "batch: folders that link to themselves", 0, prepare=circle, arguments=batch, made=("out/a.png",)
    )

    def empty(folder):
        scene(folder)
        (folder / "guides/a.jpg").rename(folder / "guides/b.jpg")

    yield Case("paths", "batch: nothing pairs", 5, "1 depth files and 1 guides make no pair", "DEPTHS", empty, batch)
    yield Case(
        "paths",
        "batch: no such folder",
        4,
        "must be a folder, a file or a glob",
        "none",
        scene,
        ("batch", "none", "guides", "out"),
    )

    def rows(*lines):
        def prepare(folder):
            (folder / "list.jsonl").write_text(
                "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in lines)
            )

        return prepare

    good = {"depth": "depth.png", "guide": "guide.jpg"}
    manifest = ("batch", "--manifest", "list.jsonl", "out")
    for what, out, message in (
        ("..", "../x.png", "must not contain '..'"),
        ("an absolute path", "/tmp/x.png", "must be relative to the output folder"),
        ("the journal's folder", ".ddfup/x.png", "must not lie in .ddfup"),
        ("an unknown suffix", "x.exe", "must end in one of .png"),
        ("a name of 300 bytes", "x" * 296 + ".png", "must have names of at most 250 bytes"),
        ("a number", 3, "out must be a text"),
    ):
        listed = rows({**good, "out": out})
        yield Case("paths", f"manifest: out with {what}", 4, message, "list.jsonl:1", listed, manifest)
    yield Case("paths", "manifest: no JSON", 4, "must have depth and guide", "list.jsonl:1", rows("{"), manifest)
    yield Case(
        "paths",
        "manifest: no guide",
        4,
        "must have depth and guide",
        "list.jsonl:1",
        rows({"depth": "depth.png"}),
        manifest,
    )
    twice = rows({**good, "out": "x.png"}, {**good, "out": "x.png"})
    yield Case("paths", "manifest: one output twice", 5, "would all become x.png", "x.png", twice, manifest)
    yield Case("paths", "manifest: empty", 5, "must list a pair", "list.jsonl", rows(), manifest)
    yield Case("paths", "manifest: missing", 2, "must be a readable", "list.jsonl", arguments=manifest)
    head = put("list.csv", b"left,right\na,b\n")
    csv = ("batch", "--manifest", "list.csv", "out")
    yield Case(
        "paths", "manifest: CSV without its columns", 2, "must have columns depth and guide", "list.csv", head, csv
    )
    fields = put("list.csv", b"depth,guide\ndepth.png,guide.jpg,x.png\n")
    yield Case(
        "paths", "manifest: CSV row with too many fields", 4, "must have as many fields", "list.csv:2", fields, csv
    )


def _outputs():
    def taken(folder):
        (folder / "depth_up.png").write_bytes(b"precious")

    yield Case("output", "exists", 6, "must not exist yet; it does", "depth_up.png", taken)
    yield Case("output", "is a folder", 6, "an output must be a file", ".", arguments=(*UPSAMPLE, "-o", "."))
    yield Case(
        "output",
        "its folder is missing",
        6,
        "its folder must exist",
        "no/r.png",
        arguments=(*UPSAMPLE, "-o", "no/r.png"),
    )
    yield Case(
        "output",
        "its folder is a file",
        6,
        "its folder must be one",
        "r.png",
        arguments=(*UPSAMPLE, "-o", "guide.jpg/r.png"),
    )
    yield Case(
        "output",
        "is the input",
        6,
        "must not replace an input",
        "depth.png",
        arguments=(*UPSAMPLE, "-o", "depth.png", "--overwrite"),
    )
    yield Case(
        "output", "of an unknown kind", 2, "-o must end in one of", "r.exe", arguments=(*UPSAMPLE, "-o", "r.exe")
    )

    def out(folder):
        (folder / "out").mkdir()

    def closed(folder):
        out(folder)
        folder.chmod(0o755)
        (folder / "out").chmod(0o555)

    big = (*UPSAMPLE, "-o", "out/r.npy")
    yield Case(
        "output",
        "on a read-only disk",
        6,
        "must be writable",
        "out/r.npy",
        out,
        big,
        lambda f: disks.read_only(f / "out"),
    )
    yield Case("output", "in another user's folder", 6, "must be writable", "out/r.npy", closed, big, unprivileged)
    yield Case(
        "output",
        "on a full disk",
        6,
        "No space left on device",
        "out/r.npy",
        out,
        big,
        lambda f: disks.full_disk(f / "out"),
    )
    yield Case(
        "output",
        "beyond the largest file",
        6,
        "File too large",
        "out/r.npy",
        out,
        big,
        lambda f: disks.small_files(1024),
    )
    yield Case(
        "output",
        "fails at the end (EIO)",
        6,
        "Input/output error",
        "out/r.npy",
        out,
        big,
        lambda f: disks.failing("fsync"),
    )

    def scene(folder):
        (folder / "depths").mkdir()
        (folder / "guides").mkdir()
        (folder / "depth.png").rename(folder / "depths/a.png")
        (folder / "guide.jpg").rename(folder / "guides/a.jpg")
        out(folder)

    def plain(folder):
        scene(folder)
        (folder / "out").rmdir()
        (folder / "out").write_bytes(b"a file")

    batch = ("batch", "depths", "guides", "out")
    yield Case("output", "batch: out is a file", 6, "must be a folder", "out", plain, batch)
    yield Case(
        "output",
        "batch: on a read-only disk",
        6,
        "must be writable",
        "out",
        scene,
        batch,
        lambda f: disks.read_only(f / "out"),
    )
    yield Case(
        "output",
        "batch: on a full disk",
        6,
        "No space left on device",
        "out",
        scene,
        batch,
        lambda f: disks.full_disk(f / "out"),
    )


def _weights():
    import hashlib

    from networks import tiny_pyramid
    from safetensors.numpy import load_file, save_file

    from ddfup import models

    def save(folder, network=None, architecture="pyramid"):
        path = folder / "w.safetensors"
        models.save_weights(path, network or tiny_pyramid(), architecture=architecture, name="w", description="tried")
        return path

    def changed(change):
        def prepare(folder):
            path = save(folder)
            path.write_bytes(change(path.read_bytes()))

        return prepare

    def rewritten(change):
        """Change tensors or metadata, and let the hash be right."""

        def prepare(folder):
            from safetensors import safe_open

            path = save(folder)
            with safe_open(path, "numpy") as file:
                metadata = dict(file.metadata())
            tensors = load_file(path)
            change(tensors, metadata)
            digest = hashlib.sha256()
            for name in sorted(tensors):
                digest.update(f"{name}{tensors[name].dtype}{tensors[name].shape}".encode() + tensors[name].tobytes())
            save_file(tensors, path, {**metadata, "tensors_sha256": digest.hexdigest()})

        return prepare

    def case(name, message, prepare=lambda folder: None, file="w.safetensors"):
        arguments = (*UPSAMPLE, "--device", "cpu", "--model", file)
        return Case("weights", name, 7, message, file, prepare, arguments, network=True)

    def spoil(tensors, metadata):
        next(iter(tensors.values())).flat[0] = np.nan

    yield case("missing", "no such weight file")
    yield case("no such model", "no model named 'nonsense'", file="nonsense")
    yield case("empty", "cannot read the weights", changed(lambda data: b""))
    yield case("cut", "cannot read the weights", changed(lambda data: data[: len(data) // 2]))
    yield case("flipped byte", "do not match their sha256", changed(lambda data: flipped(data, 1.0)))
    yield case(
        "flipped byte in the header", "cannot read the weights", changed(lambda data: flipped(data, 8 / len(data)))
    )
    yield case("a pickle", "cannot read the weights", put("w.safetensors", b"\x80\x04N."))
    other = rewritten(lambda tensors, metadata: metadata.update(architecture="ddfupnet"))
    yield case("other architecture", "ddfupnet", other)
    unknown = rewritten(lambda tensors, metadata: metadata.update(architecture="vit"))
    yield case("unknown architecture", "architecture must be one of pyramid, ddfupnet; got 'vit'", unknown)
    yield case("NaN", "holds NaN or infinity", rewritten(spoil))
    foreign = rewritten(lambda tensors, metadata: metadata.update(format="other"))
    yield case("another program's", "not a ddfup weight file", foreign)


def _devices():
    yield Case(
        "device",
        "cuda absent",
        8,
        "sees no CUDA GPU",
        "cuda",
        arguments=(*UPSAMPLE, "--device", "cuda"),
        around=without_gpu,
        network=True,
    )
    yield Case(
        "device",
        "cuda:9",
        8,
        "cuda:9",
        "cuda:9",
        arguments=(*UPSAMPLE, "--device", "cuda:9"),
        around=without_gpu,
        network=True,
    )
    yield Case(
        "device",
        "no device",
        2,
        "--device must be auto, cpu, cuda",
        "--device",
        arguments=(*UPSAMPLE, "--device", "tpu"),
    )
    small = ("--device", "cpu", "--tile", "none")
    yield Case(
        "device",
        "out of memory",
        8,
        "out of memory for a guide of 32 x 24 pixels",
        "cpu",
        arguments=(*UPSAMPLE, *small),
        around=short_memory,
        network=True,
    )


def _usage():
    for name, arguments, message, names in (
        ("no guide", ("upsample", "depth.png"), "Missing argument", "GUIDE"),
        ("unknown option", (*UPSAMPLE, "--colour"), "No such option", "--colour"),
        ("unknown command", ("upsmaple",), "No such command", "upsmaple"),
        ("unknown unit", (*UPSAMPLE, "--unit", "inch"), "must be a name or a number", "unit"),
        ("wrong invalid values", (*UPSAMPLE, "--invalid", "x"), "must be numbers", "invalid"),
        ("wrong tile", (*UPSAMPLE, "--tile", "-4"), "must be auto, none or a number of pixels", "--tile"),
        ("two answers", (*UPSAMPLE, "--overwrite", "--skip-existing"), "must not be given together", "--overwrite"),
        ("a missing config", (*UPSAMPLE, "--config", "none.toml"), "must be a readable TOML file", "none.toml"),
    ):
        yield Case("usage", name, 2, message, names, arguments=arguments)
    broken = put("c.toml", b"= 1")
    yield Case(
        "usage",
        "a broken config",
        2,
        "must be a readable TOML file",
        "c.toml",
        broken,
        (*UPSAMPLE, "--config", "c.toml"),
    )


# Wrong before any pair is known: nothing to print an object for.
_NO_PAIR = {
    "the same without --",
    "no device",
    "batch: two guides of one stem",
    "batch: nothing pairs",
    "batch: no such folder",
    "batch: out is a file",
    "batch: on a read-only disk",
    "manifest: one output twice",
    "manifest: empty",
    "manifest: missing",
    "manifest: CSV without its columns",
}


def cases():
    """Return all cases, by heading."""
    groups = (_decode, _bombs, _types, _values, _sizes, _paths, _outputs, _weights, _devices, _usage)
    return [replace(case, has_record=case.name not in _NO_PAIR) for group in groups for case in group()]
