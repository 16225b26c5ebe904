"""Tiers: every byte comes back, limits are errors with numbers, a bad disk is an error with a name, memory falls."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memory import disk_tier
from memory.disk_tier import DiskTier
from memory.ledger import MemoryFullError, MemoryLedger, Regions
from memory.tiers import HostTier, TierError
from planner.units import KIB, MIB

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)


def host(capacity_bytes=MIB):
    ledger = MemoryLedger({"host": capacity_bytes})
    return HostTier(capacity_bytes, ledger, CPU), ledger


def disk(folder, capacity_bytes=MIB, direct=True):
    ledger = MemoryLedger({"disk": capacity_bytes})
    return DiskTier(folder / "swap" / "rank-0.swap", capacity_bytes, ledger, direct=direct), ledger


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("direct", [True, False])
def test_a_cuda_device_s_bytes_go_to_the_disk_and_back(tmp_path, direct):
    """In stream order: what is stored is still being made, what is loaded into was just freed by other work."""
    cuda, rounds, rows = torch.device("cuda"), 4, 3_000_000
    ledger = MemoryLedger({"disk": 64 * MIB})
    tier = DiskTier(tmp_path / "rank-0.swap", 64 * MIB, ledger, device=cuda, direct=direct)
    stored, wanted = [], []
    for seed in range(rounds):
        made = torch.full((rows,), float(seed), device=cuda)
        for _ in range(20):
            made = made * 1.5 + 1
        stored.append(tier.store(made))
        wanted.append(float(made[0]))
        stored[-1].transfer.wait()
        del made
    for each, value in zip(stored, wanted, strict=True):
        busy = torch.randn(2048, 2048, device=cuda)
        del busy
        into = torch.empty(rows, device=cuda)
        tier.load(each, into).wait()
        assert torch.equal(into, torch.full_like(into, value))
        tier.release(each)
    tier.close()


@pytest.fixture(params=["host", "disk", "disk through the page cache"])
def tier(request, tmp_path):
    tier, ledger = host() if request.param == "host" else disk(tmp_path, direct=request.param == "disk")
    yield tier, ledger
    tier.close()


def random_tensor(shape, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).mul(50).to(dtype)


class TestRoundTrip:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_any_dtype_and_shape(self, tier, dtype):
        tier, ledger = tier
        for seed, shape in enumerate([(), (1,), (7, 3), (2, 0 + 5, 4), (1000, 3)]):
            source = random_tensor(shape, dtype, seed)
            wanted = source.clone()
            stored = tier.store(source)
            stored.transfer.wait()
            source.zero_()
            into = torch.empty_like(wanted)
            tier.load(stored, into).wait()
            assert torch.equal(into, wanted)
            tier.release(stored)
        assert ledger.used_bytes(tier.name) == 0

    def test_many_at_once_in_any_order(self, tier):
        tier, ledger = tier
        rng = random.Random(1)
        live = []
        for seed in range(150):
            if live and (rng.random() < 0.5 or len(live) > 12):
                stored, wanted = live.pop(rng.randrange(len(live)))
                into = torch.empty_like(wanted)
                tier.load(stored, into).wait()
                assert torch.equal(into, wanted)
                tier.release(stored)
            else:
                source = random_tensor((rng.randint(1, 12000),), torch.float32, seed)
                live.append((tier.store(source), source.clone()))
        for stored, _ in live:
            stored.transfer.wait()
            tier.release(stored)
        assert ledger.used_bytes(tier.name) == 0 and 0 < ledger.peak_bytes(tier.name) <= MIB

    def test_more_than_one_piece(self, tmp_path, monkeypatch):
        monkeypatch.setattr(disk_tier, "_PIECE_BYTES", 8192)
        tier, _ = disk(tmp_path)
        source, into = random_tensor((7001, 5), torch.float32, 3), torch.empty(7001, 5)
        tier.load(tier.store(source), into).wait()
        assert torch.equal(source, into)
        tier.close()

    def test_a_place_that_was_released_is_not_read_again(self, tier):
        tier, _ = tier
        first = tier.store(torch.zeros(100))
        first.transfer.wait()
        tier.release(first)
        with pytest.raises(TierError, match="after it was released"):
            tier.load(first, torch.empty(100))
        second = tier.store(torch.ones(100))
        second.transfer.wait()
        assert second.offset == first.offset, "the same place"
        for again in (lambda: tier.load(first, torch.empty(100)), lambda: tier.release(first)):
            with pytest.raises(TierError, match="after it was released"):
                again()
        tier.release(second)

    def test_overwritten_in_place(self, tier):
        tier, ledger = tier
        first, behind = tier.store(torch.zeros(3000)), tier.store(torch.full((10,), 7.0))
        for transfer in (first.transfer, behind.transfer):
            transfer.wait()
        used = ledger.used_bytes(tier.name)
        second = tier.overwrite(first, torch.arange(3000.0))
        assert second.offset == first.offset and ledger.used_bytes(tier.name) == used
        into, other = torch.empty(3000), torch.empty(10)
        tier.load(second, into).wait()
        tier.load(behind, other).wait()
        assert torch.equal(into, torch.arange(3000.0)) and other.eq(7).all()
        with pytest.raises(ValueError, match="12000 bytes were stored, 40 are asked for"):
            tier.overwrite(second, torch.zeros(10))
        for stored in (second, behind):
            tier.release(stored)
        with pytest.raises(TierError, match="after it was released"):
            tier.overwrite(second, torch.zeros(3000))

    def test_only_contiguous_tensors(self, tier):
        with pytest.raises(ValueError, match="contiguous"):
            tier[0].store(torch.zeros(4, 6).t())


class TestLimits:
    def test_full_says_need_and_have_before_it_writes(self, tier):
        tier, ledger = tier
        first = tier.store(torch.zeros(700 * KIB, dtype=torch.uint8))
        with pytest.raises(MemoryFullError, match=rf"{tier.name}: need 400 KiB .* have 324 KiB of 1 MiB") as caught:
            tier.store(torch.zeros(400 * KIB, dtype=torch.uint8))
        assert (caught.value.needed_bytes, caught.value.available_bytes) == (400 * KIB, 324 * KIB)
        first.transfer.wait()
        assert tier.written_bytes == 700 * KIB == ledger.used_bytes(tier.name)
        tier.release(first)
        tier.store(torch.zeros(MIB, dtype=torch.uint8)).transfer.wait()

    def test_pieces_too_small_say_the_largest(self, tier):
        tier, _ = tier
        places = [tier.store(torch.zeros(256 * KIB, dtype=torch.uint8)) for _ in range(4)]
        for place in places:
            place.transfer.wait()
        tier.release(places[0])
        tier.release(places[2])
        with pytest.raises(MemoryFullError, match="largest free piece has 256 KiB"):
            tier.store(torch.zeros(512 * KIB, dtype=torch.uint8))
        tier.release(places[1])
        tier.store(torch.zeros(768 * KIB, dtype=torch.uint8)).transfer.wait()

    def test_ledger_refuses_what_was_never_reserved(self):
        ledger = MemoryLedger({"host": 100})
        ledger.reserve("host", 60, "a")
        with pytest.raises(ValueError, match="only 60"):
            ledger.release("host", 61)
        with pytest.raises(MemoryFullError, match="need 41 B for b, have 40 B of 100 B"):
            ledger.reserve("host", 41, "b")

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(st.lists(st.integers(1, 90), max_size=40), st.randoms(use_true_random=False))
    def test_regions_never_overlap_and_merge_again(self, sizes, rng):
        regions, live = Regions(640, alignment_bytes=16), []
        for size in sizes:
            offset = regions.take(size)
            if offset is None:
                assert regions.largest_free_bytes < regions.size_bytes(size)
            else:
                live.append((offset, size))
            if live and rng.random() < 0.4:
                regions.give(*live.pop(rng.randrange(len(live))))
            spans = sorted((offset, offset + regions.size_bytes(size)) for offset, size in live)
            assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:], strict=False))
            assert not spans or (spans[0][0] >= 0 and spans[-1][1] <= 640)
        for offset, size in live:
            regions.give(offset, size)
        assert regions.largest_free_bytes == 640


def python(code, *arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)], cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, **options,
    )


class TestDisk:
    def test_no_name_in_the_folder_while_it_lives(self, tmp_path):
        tier, _ = disk(tmp_path)
        assert list((tmp_path / "swap").iterdir()) == []
        tier.close()

    def test_full_disk_is_one_line_before_anything_is_stored(self, tmp_path, monkeypatch):
        def full(file, offset, length):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "posix_fallocate", full)
        with pytest.raises(MemoryFullError) as caught:
            disk(tmp_path, 8 * MIB)
        assert caught.value.needed_bytes == 8 * MIB
        text = str(caught.value)
        assert "\n" not in text and str(tmp_path / "swap" / "rank-0.swap") in text
        assert "cannot reserve 8 MiB: No space left" in text and "free on this disk" in text
        assert list((tmp_path / "swap").iterdir()) == []

    def test_more_than_is_free_is_refused_without_filling_the_disk(self, tmp_path, monkeypatch):
        monkeypatch.setattr(os, "posix_fallocate", lambda *_: pytest.fail("the disk was filled"))
        with pytest.raises(MemoryFullError, match="No space left") as caught:
            disk(tmp_path, 2**60)
        assert 0 < caught.value.available_bytes < 2**60

    def test_a_folder_that_cannot_be_made_names_the_file(self, tmp_path):
        (tmp_path / "swap").write_text("in the way")
        with pytest.raises(TierError, match=r"swap/rank-0.swap: cannot reserve 1 MiB: "):
            disk(tmp_path)

    def test_a_limit_of_the_system_is_the_same_error(self, tmp_path):
        code = """
            import resource, sys
            from pathlib import Path
            from memory.disk_tier import DiskTier
            from memory.ledger import MemoryLedger
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
            try:
                DiskTier(Path(sys.argv[1]), 1 << 21, MemoryLedger({"disk": 1 << 21}))
            except Exception as error:
                print(type(error).__name__, error)
        """
        out, _ = python(code, tmp_path / "file").communicate(timeout=120)
        assert out.startswith(f"MemoryFullError disk tier {tmp_path / 'file'}: cannot reserve 2 MiB: File too large")

    def test_failed_write_names_file_and_offset(self, tmp_path, monkeypatch):
        tier, _ = disk(tmp_path)
        tier.store(torch.zeros(5000, dtype=torch.uint8)).transfer.wait()

        def fail(*_):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(disk_tier.os, "pwrite", fail)
        stored = tier.store(torch.zeros(10, dtype=torch.uint8))
        with pytest.raises(TierError, match=r"rank-0.swap: write at byte 8192 failed: Input/output error"):
            stored.transfer.wait()
        tier.close()

    @pytest.mark.parametrize("direct", [True, False])
    def test_failed_and_short_reads_name_file_and_offset(self, tmp_path, monkeypatch, direct):
        tier, _ = disk(tmp_path, direct=direct)
        stored = tier.store(torch.arange(3000))
        stored.transfer.wait()
        os.ftruncate(tier._descriptor, 9000)
        with pytest.raises(TierError, match=r"read at byte 9000 failed: the file ends 15000 bytes too early"):
            tier.load(stored, torch.empty(3000, dtype=torch.int64)).wait()

        def fail(*_):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(disk_tier.os, "preadv", fail)
        with pytest.raises(TierError, match=r"rank-0.swap: read at byte 0 failed: Input/output error"):
            tier.load(stored, torch.empty(3000, dtype=torch.int64)).wait()
        tier.close()

    @pytest.mark.parametrize(("direct", "taken", "given"), [(False, 777, 555), (True, 4096, 4096)])
    def test_partial_reads_and_writes_are_continued(self, tmp_path, monkeypatch, direct, taken, given):
        tier, _ = disk(tmp_path, direct=direct)
        pwrite, preadv = os.pwrite, os.preadv
        monkeypatch.setattr(disk_tier.os, "pwrite", lambda file, data, at: pwrite(file, data[:taken], at))
        monkeypatch.setattr(disk_tier.os, "preadv", lambda file, data, at: preadv(file, [data[0][:given]], at))
        source, into = random_tensor((900, 3), torch.float32, 2), torch.empty(900, 3)
        stored = tier.store(source)
        tier.load(stored, into).wait()
        assert torch.equal(source, into)
        tier.close()

    def test_sigkill_leaves_nothing(self, tmp_path):
        code = """
            import sys, time, torch
            from pathlib import Path
            from memory.disk_tier import DiskTier
            from memory.ledger import MemoryLedger
            tier = DiskTier(Path(sys.argv[1]) / "rank-0.swap", 1 << 24, MemoryLedger({"disk": 1 << 24}))
            tier.store(torch.ones(1 << 20)).transfer.wait()
            print("stored", flush=True)
            time.sleep(60)
        """
        process = python(code, tmp_path)
        assert process.stdout.readline() == "stored\n"
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        assert list(tmp_path.iterdir()) == []
        tier = DiskTier(tmp_path / "rank-0.swap", MIB, MemoryLedger({"disk": MIB}))
        tier.close()

    def test_resident_memory_falls_by_what_is_stored(self, tmp_path):
        """Four pieces of 36 MiB: the peak must stay far below what keeping them takes."""
        code = """
            import sys, torch
            from pathlib import Path
            from memory.disk_tier import DiskTier
            from memory.ledger import MemoryLedger
            from memory.peak import PeakMemory
            tier = DiskTier(Path(sys.argv[1]) / "f", 1 << 28, MemoryLedger({"disk": 1 << 28}))
            torch.ones(1 << 20)
            peak, kept, stored = PeakMemory(torch.device("cpu")), [], []
            peak.reset()
            before = peak.read_bytes()
            for number in range(4):
                piece = torch.full((9 << 20,), float(number))
                if sys.argv[2] == "keep":
                    kept.append(piece)
                else:
                    stored.append(tier.store(piece))
                    stored[-1].transfer.wait()
            print(peak.read_bytes() - before)
            into = torch.empty(9 << 20)
            for number, place in enumerate(stored):
                tier.load(place, into).wait()
                assert into.eq(number).all()
            tier.close()
        """
        grown = {}
        for how in ("keep", "store"):
            out, errors = python(code, tmp_path, how).communicate(timeout=120)
            assert out, errors
            grown[how] = int(out)
        assert grown["keep"] > 130 * MIB and grown["store"] < 90 * MIB, grown
