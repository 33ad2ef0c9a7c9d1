"""Host-side decompression: every format a kernel build can make, and damage in each of them."""

from __future__ import annotations

import base64
import gzip
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import lz4.block
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from images import COMPRESSORS, compress, with_size

from kvmpy.boot import cache, lzo, payload
from kvmpy.core.errors import ImageError

CONTENT = b"".join(sha256(bytes([i])).digest() * 40 for i in range(200))  # 256,000 bytes


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kvmpy" / "payloads"


def unpack(data: bytes, limit: int = payload.MAX) -> bytes:
    return payload.decompress(memoryview(data), limit)


@pytest.mark.parametrize("name", COMPRESSORS)
def test_every_format(name: str) -> None:
    assert payload.identify(compress(name, CONTENT)) == name
    assert unpack(compress(name, CONTENT)) == CONTENT
    assert unpack(with_size(name, CONTENT)) == CONTENT


@pytest.mark.parametrize("name", COMPRESSORS)
def test_cut_off(name: str) -> None:
    data = compress(name, CONTENT)

    with pytest.raises(ImageError, match=f"its {name} data (ends early|is damaged).*; the file is damaged or"):
        unpack(data[: len(data) // 2])


@pytest.mark.parametrize("name", COMPRESSORS)
def test_more_than_the_limit(name: str) -> None:
    data = compress(name, CONTENT)

    assert unpack(data, len(CONTENT)) == CONTENT
    with pytest.raises(ImageError, match=f"its {name} data has more than 255999 bytes"):
        unpack(data, len(CONTENT) - 1)


@pytest.mark.parametrize("name", sorted(set(COMPRESSORS) - {"gzip"}))
def test_appended_size_is_checked(name: str) -> None:
    with pytest.raises(ImageError, match=f"its {name} data makes 256000 bytes instead of 255999"):
        unpack(compress(name, CONTENT) + struct.pack("<I", 255999))


def test_unknown_format() -> None:
    with pytest.raises(payload.UndecodableError, match=r"no known compression format \(7f 45 4c 46\)"):
        unpack(b"\x7fELF" + bytes(100))


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lz4", None)
    monkeypatch.setitem(sys.modules, "lz4.block", None)

    with pytest.raises(payload.UndecodableError, match=r"a lz4 payload, and Python cannot .*; pip install lz4"):
        unpack(compress("lz4", CONTENT))


def bomb_gzip() -> bytes:
    """64 MiB of zeros."""
    return gzip.compress(bytes(64 << 20), 1)


def bomb_lz4() -> bytes:
    """1,000 blocks of 8 MiB of zeros, in 33 MB."""
    block = lz4.block.compress(bytes(8 << 20), store_size=False)
    return b"\x02\x21\x4c\x18" + (struct.pack("<I", len(block)) + block) * 1000


def bomb_zstd() -> bytes:
    """A frame of 4-byte RLE blocks of 128 KiB, 8 GiB in all (RFC 8878, 3.1.1.2)."""
    header = b"\x28\xb5\x2f\xfd" + bytes([0x00, 0x58])  # no content size, window of 2 MiB
    block = ((128 << 10) << 3 | 1 << 1).to_bytes(3, "little") + b"\0"
    return header + block * 65536


@pytest.mark.parametrize("bomb", [bomb_gzip, bomb_lz4, bomb_zstd])
def test_bombs_are_stopped_at_the_limit(bomb: Callable[[], bytes]) -> None:
    with pytest.raises(ImageError, match="has more than 16777216 bytes"):
        unpack(bomb(), 16 << 20)


def test_lz4_block_that_is_empty() -> None:
    with pytest.raises(ImageError, match="has an empty block"):
        unpack(b"\x02\x21\x4c\x18" + struct.pack("<IB", 1, 0) * 3)


def test_lz4_blocks_without_end_that_make_nothing() -> None:
    block = lz4.block.compress(b"x", store_size=False)
    with pytest.raises(ImageError, match="has blocks that are too small"):
        unpack(b"\x02\x21\x4c\x18" + (struct.pack("<I", len(block)) + block) * 1000)


def test_lz4_blocks_keep_their_order() -> None:
    parts = [bytes([number]) * (8 << 20) for number in range(9)] + [b"end"]
    blocks = [lz4.block.compress(part, store_size=False) for part in parts]
    data = b"\x02\x21\x4c\x18" + b"".join(struct.pack("<I", len(block)) + block for block in blocks)

    assert unpack(data) == b"".join(parts)


def test_zstd_with_a_huge_window() -> None:
    window = bytes([0x00, 21 << 3])  # 2 GiB (RFC 8878, 3.1.1.1.2)
    block = (4 << 3 | 1).to_bytes(3, "little") + b"data"

    with pytest.raises(ImageError, match=r"its zstd data is damaged \(.*too much memory"):
        unpack(b"\x28\xb5\x2f\xfd" + window + block)


# Of lzop -9: every instruction of the format (Documentation/staging/lzo.rst), long and short lengths, repetitions.
LZOP = base64.b85decode(
    """
iA-8g01XNn3J^dbpb0<&2?GEC4FCWD0BZq3_y7O^001j20~-JUqp|=11G8O+_=*;5c5QHZC=dVu02^*J3!MM6dYGK0MCQAA3M_b#9Y3=-
ICg~*qXrkRpdCx~5-&7GRK+{qF1w7<x8u=Z3f3{hg{9Zb;yibSMVi~ew8;Sf<c(KbU8Tl21OX-XU9kQ>BuPtl>X>9#*@g&D?FhMeuT6a!YIH`Z
YghoDV{2g@v0@RnTAHo@DaGY2oKTEVBS$n%j0dfe%hm>p{B{3glJH`noTGuro^j`Unwsh33k|)t^$?<D@15s?P#t?~lCFvC1)N&9L)&LqZkYPg
eW1CPi@-
Ud?=;Cdxwz#csJ{4}M}`Q+?DonvhgkN~er)toa+7&?r%3&XIUTln&f0y)zaIcz=y|^C*LjrBS2IEE7qyGOezQ#{5y_Lm*><rgvlxxRf|@H#G%r
*$>*bN5+IJuat^{~_AP2<*03ZMh0svuRAOLO!0N`0+(G39;MPhjk0?|=oKMex6U1IwU0whUe91Q|>Rbvkg0#-
p}$_)Z7O=JZP0!Ue8whaPTMP&dD0*yh7(+vX3O^b;Q0*hITn+*blMT|rZ0=iL*$qfR=U5s}P0%b{!oecsURgE4E0z5&E4h;giPmV1-
S9y+<4FbAFk68@@M^TT^4FVZmk7W%4$VreR4FU^Ia;*&lZ&`8^4Fc&!bK(sG5m9rB4Fa%Tb3hFOkx6uu4FacCbixe+z(I8}4FXY3b!!a*Bw2N;
4Fa}Jl>Q9@PFa+C4Fc{(mFx`y&QX<H4FZ;3l_d=VPDz&Y4FU;OmJSU9z(JR~4FXtAmo5zg?^%}-
4FZovm^BRom{FLS4FUySn8XbN+DVyB4FbwlnR^WaR6&|P4FYRTn)eL?=UJLC4Fb<an+gpAMp2v34FaHDn{W*RcuAbd4FdjEoRSR!)Iput4FdX2
oiYsq03ZMW000000OkMyAOHXWnE(JHjzxXjB!5MWxWym<00000008DVARqt$000000OkMyAOHXW00000<^TX7000000002y001BW00000008Cy
03ZMW000000OkMyAOHXW00000<^TX7000000002y001BW07(D<5a$d~0_pJ$MJg9qPapsQ000000Os@~AOHXW00000<^TX7000000002y001BW
00000008Cy03ZMW000000OkMyAOHXW00000<^TX7000000002y001BW00000008Cy03ZMW000000OkMyAOHXW00005000<otc(!=0000000
""".replace("\n", "")
)


def lzop_content() -> bytes:
    noise = b"".join(sha256(bytes([i])).digest() for i in range(20))
    out = bytearray(b"kvmpy" * 3 + noise[:300])
    out += noise[:40] + b"xy" + noise[100:140] + bytes(300) + b"ab" * 200
    for i in range(60):
        out += noise[300 + i : 301 + i] + noise[4 * i : 4 * i + 3] + noise[400 + i : 401 + i] + out[-7:-5]
    out += bytes(3000) + noise[50:54] + noise[500:502] + noise[60:66] + noise[510:513]
    out += bytes(17000) + noise[10:250] + noise[520:525] + noise[:9]
    out += bytes(20000) + noise[:120]
    return bytes(out)


def test_lzop_file() -> None:
    content, end = lzo.decompress(memoryview(LZOP + b"rest"), 1 << 20)

    assert content == lzop_content()
    assert end == len(LZOP)


def test_lzop_cut_off_everywhere() -> None:
    for length in range(len(payload.LZO_MAGIC), len(LZOP)):
        with pytest.raises(ValueError, match=r"ends early|is damaged|wrong checksum"):
            lzo.decompress(memoryview(LZOP[:length]), 1 << 20)


def content_or_none(data: bytes) -> bytes | None:
    try:
        return lzo.decompress(memoryview(data), 1 << 20)[0]
    except ValueError:
        return None


@settings(max_examples=300, deadline=None)
@given(st.integers(60, len(LZOP) - 5), st.integers(1, 255))
def test_damage_in_an_lzop_file_is_seen_where_it_matters(at: int, flip: int) -> None:
    data = bytearray(LZOP)
    data[at] ^= flip

    assert content_or_none(data) in (None, lzop_content())  # zeros copied from elsewhere are still zeros


@settings(max_examples=300, deadline=None)
@given(st.binary(min_size=1, max_size=200), st.integers(0, 5000))
def test_any_bytes_as_lzo_stream(stream: bytes, size: int) -> None:
    file = LZOP[: LZOP.index(b"\x00\x00\xa3\xb2")] + struct.pack(">III", size + 201, len(stream), 0) + stream + bytes(4)

    with pytest.raises(ValueError, match=r"ends early|is damaged|wrong checksum|has more than"):
        lzo.decompress(memoryview(file), 1 << 20)


@pytest.mark.skipif(shutil.which("lzop") is None, reason="no lzop on this host")
@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.binary(min_size=1, max_size=40), st.integers(1, 3000)), max_size=40), st.sampled_from("19")
)
def test_what_lzop_makes(pieces: list[tuple[bytes, int]], level: str) -> None:
    content = b"".join(piece * count for piece, count in pieces) + b"end"
    packed = subprocess.run(["lzop", f"-{level}", "-c"], input=content, stdout=subprocess.PIPE, check=True).stdout

    assert lzo.decompress(memoryview(packed), 16 << 20) == (content, len(packed))


def test_second_time_comes_from_the_cache(folder: Path) -> None:
    data = compress("xz", CONTENT)
    unpack(data)
    (cached,) = folder.iterdir()
    cached.write_bytes(cache.RECORD.pack(cache.MAGIC, 6, sha256(b"cached").digest()) + b"cached")

    assert unpack(data) == b"cached"
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: b"",
        lambda whole: whole[:63],
        lambda whole: whole[:-1],
        lambda whole: whole[:-1] + b"X",
        lambda whole: whole + b"X",
        lambda whole: b"X" + whole[1:],
    ],
)
def test_damaged_cache_entries_are_replaced(folder: Path, damage: Callable[[bytes], bytes]) -> None:
    data = compress("xz", CONTENT)
    unpack(data)
    (cached,) = folder.iterdir()
    whole = cached.read_bytes()
    cached.write_bytes(damage(whole))

    assert unpack(data) == CONTENT
    assert cached.read_bytes() == whole


def test_cached_content_is_held_to_the_limit() -> None:
    data = compress("xz", CONTENT)
    unpack(data)

    with pytest.raises(ImageError, match="has more than 100 bytes"):
        unpack(data, 100)


def test_fast_formats_are_not_cached(folder: Path) -> None:
    unpack(compress("lz4", CONTENT))
    unpack(compress("zstd", CONTENT))

    assert not folder.exists()


def test_only_the_newest_are_kept(folder: Path) -> None:
    for index in range(cache.KEEP + 3):
        unpack(compress("gzip", b"%d" % index))

    assert len(list(folder.iterdir())) == cache.KEEP


@pytest.mark.parametrize("obstacle", ["a file", "a folder in the way of the entry"])
def test_a_cache_that_cannot_be_written_does_no_harm(folder: Path, obstacle: str) -> None:
    data = compress("xz", CONTENT)
    places = {"a file": folder.parent, "a folder in the way of the entry": folder / sha256(data).hexdigest() / "x"}
    places[obstacle].parent.mkdir(parents=True)
    places[obstacle].touch()

    assert unpack(data) == CONTENT
    assert list(folder.parent.rglob("tmp*")) == []


def test_relative_cache_folders_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    monkeypatch.setenv("HOME", "/home/someone")

    assert cache.folder() == Path("/home/someone/.cache/kvmpy/payloads")
