"""Image files as people have them: of 16 bits, transparent, turned, linked, hidden, damaged; what is read of each."""

import os
import pathlib
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image
from test_data import write_images
from test_experiment import tiny, untrained

from score_jax import data, edit, experiment, files, images, workdir
from score_jax.errors import UserError

RAMP = (np.arange(16, dtype=np.uint16) * 4369).reshape(4, 4)  # 16 bits: 0, 4369, 8738, ... 65535.
GREY = (np.arange(16, dtype=np.uint8) * 17).reshape(4, 4)  # The same in 8 bits.
# The colours (r, g, b) of the corners of a 2 x 3 image that is not symmetric.
CORNERS = np.array([[[255, 0, 0], [0, 255, 0], [9, 9, 9]], [[0, 0, 255], [255, 255, 0], [0, 0, 0]]], np.uint8)


def read(path, **options):
    return images.open_image(path, None, **options)


def folder(path, split="train", **options):
    return data.load("folder", split, data_dir=str(path), **options)


@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("a.png", Image.fromarray(RAMP)),  # `I;16`
        ("a.tif", Image.fromarray(RAMP)),
        ("a.tiff", Image.frombytes("I;16B", (4, 4), RAMP.astype(">u2").tobytes())),
        ("a.pgm", Image.fromarray(RAMP.astype(np.int32))),  # `I`, and of 16 bits in this format
        ("a.png", Image.fromarray(GREY)),
        ("a.gif", Image.fromarray(GREY)),
        ("a.png", Image.fromarray(GREY).convert("P")),
        ("a.png", Image.fromarray(np.stack([GREY, np.full_like(GREY, 255)], -1))),  # `LA`
        ("a.tif", Image.merge("CMYK", [Image.fromarray(255 - GREY)] * 3 + [Image.new("L", (4, 4))])),
    ],
    ids=lambda value: value if isinstance(value, str) else value.mode,
)
def test_grey_levels_are_the_same_in_every_mode(tmp_path, name, image):
    image.save(tmp_path / name)
    np.testing.assert_array_equal(read(tmp_path / name), np.repeat(GREY[..., None], 3, axis=-1))
    np.testing.assert_array_equal(read(tmp_path / name, mode="L"), GREY[..., None])


def test_one_bit_is_black_and_white(tmp_path):
    Image.fromarray(np.eye(4, dtype=bool)).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read(tmp_path / "a.png", mode="L")[..., 0], 255 * np.eye(4))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_of_32_bits_are_refused(tmp_path, dtype):
    Image.fromarray(RAMP.astype(dtype)).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match=r"cannot read the image .*a.tif: pixels of 32 bits have no range"):
        read(tmp_path / "a.tif")


def tiff_grey(bits, white_is_zero, data):
    """A TIFF of one row, as cameras and microscopes write it and Pillow does not."""
    width = len(data) * 8 // bits
    tags = [(256, 3, width), (257, 3, 1), (258, 3, bits), (259, 3, 1), (262, 3, 0 if white_is_zero else 1)]
    tags += [(273, 4, 8), (277, 3, 1), (278, 3, 1), (279, 4, len(data))]
    data += b"\0" * (len(data) % 2)
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + b"\0" * 4


def test_tiffs_of_12_bits_and_of_white_as_zero(tmp_path):
    (tmp_path / "a.tif").write_bytes(tiff_grey(12, False, bytes([0x00, 0x0F, 0xFF])))
    np.testing.assert_array_equal(read(tmp_path / "a.tif", mode="L")[0, :, 0], [0, 255])
    (tmp_path / "a.tif").write_bytes(tiff_grey(16, True, RAMP[0].astype("<u2").tobytes()))
    np.testing.assert_array_equal(read(tmp_path / "a.tif", mode="L")[0, :, 0], 255 - GREY[0])


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif"])
def test_orientation_is_that_of_exif(tmp_path, name):
    """6: what is stored is to be turned by 90 degrees clockwise; sizes from the header agree with what is read."""
    exif = Image.Exif()
    exif[0x0112] = 6
    big = CORNERS.repeat(16, axis=0).repeat(16, axis=1)
    Image.fromarray(big).save(tmp_path / name, exif=exif, lossless=True, quality=95)
    x = read(tmp_path / name)
    assert x.shape == (48, 32, 3)
    assert np.abs(x[8::16, 8::16].astype(int) - np.rot90(CORNERS, -1)).max() < 40
    assert images.stored_size(tmp_path / name, None) == (32, 48)


def test_what_is_transparent_is_white_or_what_the_config_says(tmp_path):
    pixels = np.array([[[200, 0, 0, 0], [200, 0, 0, 255], [200, 0, 0, 128]]], np.uint8)
    for i, image in enumerate([Image.fromarray(pixels), Image.fromarray(pixels[:, :2]).quantize(2)]):
        image.save(tmp_path / f"{i}.png")
        assert read(tmp_path / f"{i}.png")[0, :2].tolist() == [[255, 255, 255], [200, 0, 0]]
        assert read(tmp_path / f"{i}.png", background="black")[0, :2].tolist() == [[0, 0, 0], [200, 0, 0]]
    np.testing.assert_allclose(read(tmp_path / "0.png")[0, 2], [227, 127, 127], atol=1)
    Image.fromarray(RAMP).save(tmp_path / "0.png", transparency=4369)
    assert read(tmp_path / "0.png", mode="L")[0, :, 0].tolist() == [0, 255, 34, 51]
    (tmp_path / "1.png").unlink()
    config = tiny()
    config.data.update(name="folder", dir=str(tmp_path), background="#00ff00", image_size=4)
    assert experiment.Run(config, tmp_path / "run").dataset.read(np.arange(1))[0][0, 0, 1].tolist() == [0, 255, 0]
    config.data.background = "grean"
    with pytest.raises(UserError, match=r"config\.data\.background: .*'grean'.*'#808080' are colours, say"):
        experiment.Run(config, tmp_path / "run")


def test_a_run_older_than_the_background_goes_on(tmp_path):
    config = tiny().to_dict()
    del config["data"]["background"]
    workdir.open_workdir(tmp_path, config)
    workdir.open_workdir(tmp_path, tiny().to_dict())


def test_a_mask_drawn_in_the_alpha_channel(tmp_path):
    hidden = np.zeros((8, 8), bool)
    hidden[2:4, 3:7] = True
    config = tiny()
    run = experiment.Run(config, tmp_path / "run")

    def mask(alpha):
        Image.fromarray(np.concatenate([np.zeros((8, 8, 3)), alpha[..., None]], -1).astype(np.uint8)).save(config.mask)
        run.config.editing.mask = config.mask
        return ~np.asarray(edit._mask(run))[0, :, :, 0]

    with config.unlocked():
        config.mask = str(tmp_path / "mask.png")
    np.testing.assert_array_equal(mask(np.where(hidden, 255, 0)), hidden)
    for alpha, what in ((0, "nothing"), (255, "everything")):
        with pytest.raises(UserError, match=rf"mask\.png hides {what}: what is black and opaque is hidden"):
            mask(np.full((8, 8), alpha))


def test_hidden_files_and_side_folders_are_no_images_and_no_classes(tmp_path, capsys):
    write_images(tmp_path, ["a/0.png", "b/1.png"])
    side = [".ipynb_checkpoints/2.png", "__MACOSX/a/3.png", "a/._0.png", ".x.png", "b/.thumbs/4.png", "@eaDir/5.png"]
    write_images(tmp_path, side)
    (tmp_path / "b/Thumbs.db").write_bytes(b"")
    (tmp_path / "b/c.png").mkdir()
    os.mkfifo(tmp_path / "b/pipe.png")
    dataset = folder(tmp_path)
    assert (dataset.size, dataset.class_names) == (2, ("a", "b"))
    x, y = dataset.read(np.arange(2))
    assert (x[:, 0, 0, 0].tolist(), y.tolist()) == ([10, 20], [0, 1])
    assert not capsys.readouterr().out
    assert len(files.read_images(tmp_path / "b", (8, 8, 3))) == 1


def test_links_are_followed_and_circles_end(tmp_path, capsys):
    write_images(tmp_path / "far", ["b/1.png", "b/deep/2.png", "3.png"])
    write_images(tmp_path / "near", ["a/0.png"])
    links = {"b": "../far/b", "c/3.png": "../../far/3.png", "b/deep/up": "../..", "a/all": "..", "b/self": "."}
    links |= {"d": "nowhere", "c/4.png": "nowhere.png", "c/e.png": "e.png"}
    (tmp_path / "near/c").mkdir()
    for name, target in links.items():
        (tmp_path / "near" / name).symlink_to(target)
    dataset = folder(tmp_path / "near")
    told = capsys.readouterr().out
    assert "near/d is a link to nothing; skipped" in told
    assert "c/4.png: [Errno 2] No such file or directory" in told
    assert told.count("skipped") == 3
    assert dataset.class_names == ("a", "b", "c")
    x, y = dataset.read(np.arange(dataset.size))
    # a/0 twice more, for the two dangling links after the last image; b/deep/up has 3.png, and b, which was seen.
    seen = sorted(zip(x[:, 0, 0, 0].tolist(), y.tolist(), strict=True))
    assert seen == [(10, 0), (10, 0), (10, 0), (10, 1), (20, 1), (30, 1), (30, 2)]


def test_many_links_between_folders_are_not_followed_along_every_path(tmp_path):
    """12 folders with links to all others have 12! paths."""
    for i in range(12):
        write_images(tmp_path, [f"top/{i}/0.png"])
    for i in range(12):
        for j in range(12):
            (tmp_path / f"top/{i}/to{j}").symlink_to(f"../{j}")
    assert folder(tmp_path).size == 12


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    write_images(tmp_path, ["a/0.png", "b/1.png"])
    scandir = os.scandir

    def deny(path):
        if path.endswith("b"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(files.os, "scandir", deny)
    with pytest.raises(UserError, match=r"cannot list .*/b: Permission denied"):
        folder(tmp_path)


def test_classes_have_numbers_by_name_in_both_splits(tmp_path):
    write_images(tmp_path, ["train/b/0.png", "train/d/1.png", "test/a/2.png", "test/d/3.png"])
    train, test = (folder(tmp_path, split) for split in data.SPLITS)
    assert (train.class_names, train.num_classes) == (("b", "d"), 2)
    assert (test.class_names, test.num_classes) == (("b", "d", "a"), 3)
    assert train.read(np.arange(2))[1].tolist() == [0, 1]
    assert test.read(np.arange(2))[1].tolist() == [2, 1]


def test_images_beside_the_folders_leave_no_classes(tmp_path, capsys):
    write_images(tmp_path, ["a/0.png", "b/1.png", "cover.png"])
    dataset = folder(tmp_path)
    assert (dataset.size, dataset.num_classes, dataset.class_names) == (3, 0, ())
    assert "holds images beside its folders, cover.png say: the folders are not taken" in capsys.readouterr().out


def conditional(path, **network):
    config = tiny("vp_digits_conditional")
    config.data.update(name="folder", dir=str(path))
    config.network.update(network)
    return config


@pytest.mark.parametrize("name", ["vp_digits_conditional", "classifier_digits"])
def test_more_classes_than_the_network_takes_are_one_line_at_the_start(tmp_path, name):
    write_images(tmp_path / "data", [f"{i:02}/0.png" for i in range(12)])
    config = tiny(name)
    config.data.update(name="folder", dir=str(tmp_path / "data"))
    words = r"takes config\.network\.num_classes=10 classes, and the train split of .*'folder' has 12, beyond them '10'"
    with pytest.raises(UserError, match=words) as caught:
        experiment.run(config, "train", tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_no_classes_and_fewer_classes_are_said(tmp_path, capsys):
    write_images(tmp_path / "none", ["0.png"])
    with pytest.raises(UserError, match=r"num_classes=10 classes, and the train split of .*'folder' has none"):
        experiment.Run(conditional(tmp_path / "none"), tmp_path / "run")
    write_images(tmp_path / "few", ["train/a/0.png", "train/b/1.png", "test/z/0.png"])
    experiment.Run(conditional(tmp_path / "few"), tmp_path / "run")
    assert "'folder' has 2 of the 10 classes that the network takes: of class 2 and those" in capsys.readouterr().out
    config = conditional(tmp_path / "few", num_classes=2)
    run = experiment.Run(config, tmp_path / "two")
    with pytest.raises(UserError, match=r"=2 classes, and the test split of .*'folder' has 3, beyond them 'z'"):
        edit._images(run)
    config = tiny()
    config.data.update(name="folder", dir=str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"config\.evaluation\.classifier: 'folder' has no two classes to tell apart"):
        experiment.run(config, "evaluate", untrained(config, tmp_path / "plain"))


def test_labels_beyond_the_classes_are_told_where_they_are_read():
    """tensorflow-datasets has -1 in splits whose labels are not public."""
    dataset = data.Dataset(3, (1,), lambda i: (np.zeros((3, 1)), np.array([0, 1, -1], np.int32)[i]), num_classes=2)
    checked = data.labelled(dataset, 2, "the test split of the data set 'x'")
    assert checked.read(np.arange(2))[1].tolist() == [0, 1]
    with pytest.raises(UserError, match=r"classes, 0 to 1, and the test split .* has an example of the label -1"):
        checked.read(np.arange(3))


def test_images_of_other_sizes_are_told_at_the_start(tmp_path):
    write_images(tmp_path, [f"a/{i}.png" for i in range(200)])
    Image.new("RGB", (20, 12)).save(tmp_path / "a/77.png")
    words = r"differ in size: .*a/0.png is 8 x 8, .*a/77.png is 20 x 12: set config.data.image_size"
    with pytest.raises(UserError, match=words):
        folder(tmp_path)
    assert folder(tmp_path, image_size=8).shape == (8, 8, 3)
    with pytest.raises(UserError, match=r"77.png is 10 x 10: set"):
        folder(tmp_path, crop=10)
    assert folder(tmp_path, crop=6).shape == (6, 6, 3)


def test_a_damaged_header_is_of_no_other_size(tmp_path, capsys):
    """The first and another file say that they are of other sizes, and hold no pixels."""
    write_images(tmp_path, [f"{i}.png" for i in range(1, 9)])
    for name, side in (("0.png", 9), ("7.png", 10)):
        (tmp_path / name).write_bytes(png(side, side, (b"IDAT", b"")))
    x, _ = folder(tmp_path).read(np.arange(9))
    assert x[:, 0, 0, 0].tolist() == [10, 10, 20, 30, 40, 50, 60, 80, 80]
    assert capsys.readouterr().out.count("skipped") == 2


def test_a_size_that_the_network_does_not_take_is_told_with_what_to_set(tmp_path):
    Image.new("RGB", (20, 13)).save(tmp_path / "0.png")
    config = tiny()
    config.network.multipliers = (1, 1)
    config.data.update(name="folder", dir=str(tmp_path))
    with pytest.raises(UserError, match=r"divisible by 2, .* are 13 x 20 as stored: set config\.data\.image_size, 64"):
        experiment.Run(config, tmp_path / "run")
    config.network.dropout = -1.0  # No image would do.
    with pytest.raises(UserError, match=r"^config\.network\.dropout[^;]*$"):
        experiment.Run(config, tmp_path / "run")


def test_990_unreadable_images_in_a_row(tmp_path, capsys):
    """Of 100,000 one in a hundred may be; each is opened once."""
    Image.new("RGB", (8, 8), (7, 0, 0)).save(tmp_path / "good.png")
    paths = [tmp_path / f"{i}.png" for i in range(990)] + [tmp_path / "good.png"] * 99_010
    images = files.Files(paths, 8)
    assert capsys.readouterr().out.count("skipped") == 990
    assert images.read(3)[0][0, 0].tolist() == [7, 0, 0]
    assert images.read(3)[1] == 990


def png(width, height, *chunks):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*c) for c in [(b"IHDR", header), *chunks, (b"IEND", b"")])


DAMAGED = {
    "bomb.png": png(60_000, 60_000, (b"IDAT", zlib.compress(b"\0" * 100))),
    "text.png": png(8, 8, (b"zTXt", b"a\0\0" + zlib.compress(b"\0" * 2**27)), (b"IDAT", zlib.compress(b"\0" * 200))),
    "deflate.png": png(8, 8, (b"IDAT", b"x\x9cnone of it")),
    "short.png": png(8, 8, (b"iCCP", b"a"), (b"pHYs", b"1"), (b"IDAT", b"")),
    "negative.bmp": b"BM" + struct.pack("<IHHIIiiHHI", 54, 0, 0, 54, 40, -8, 2**31 - 1, 1, 24, 0) + b"\0" * 60,
    "directory.tif": b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", 1) + b"\xff" * 12,
    "empty.jpg": b"",
    "script.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_all_that_a_decoder_raises_names_the_file(tmp_path, name, capsys):
    (tmp_path / name).write_bytes(DAMAGED[name])
    Image.new("RGB", (8, 8), (7, 0, 0)).save(tmp_path / "z.png")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for options in ({"image_size": 8}, {}):
            x, _ = folder(tmp_path, **options).read(np.arange(2))
            assert x[:, 0, 0, 0].tolist() == [7, 7]
            (line,) = capsys.readouterr().out.splitlines()
            assert line.startswith(f"cannot read the image {pathlib.Path(tmp_path, name)}: ")
            assert line.endswith("; skipped")


def test_whatever_a_decoder_raises_is_told(tmp_path, monkeypatch):
    for error in (struct.error("short"), KeyError(3), MemoryError(), RecursionError("deep"), OverflowError("a\nb")):
        Image.new("L", (2, 2)).save(tmp_path / "a.png")
        monkeypatch.setattr(images, "fit", lambda *_, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(UserError, match=r"^cannot read the image [^\n]*a.png: [^\n]+$"):
            read(tmp_path / "a.png")


def test_a_name_that_is_no_text_can_be_told(tmp_path, capsys):
    write_images(tmp_path, ["a.png"])
    (tmp_path / os.fsdecode(b"b\xff.png")).write_bytes(b"")
    folder(tmp_path).read(np.arange(2))
    assert r"b\udcff.png" in capsys.readouterr().out
