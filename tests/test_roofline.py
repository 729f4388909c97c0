"""Estimates: the formula by hand, the published rows against themselves, and tables that cannot be used."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml

from edgelora import roofline
from edgelora.errors import DataError, UsageError

TABLE = roofline.load()


def test_estimate_is_efficiency_times_bandwidth_over_bytes() -> None:
    """The Raspberry Pi's four rows: 0.668, 0.583, 0.640 and 0.575 of 17.1 GB/s; their geometric mean is 0.615."""
    made = roofline.estimate(TABLE, TABLE.devices["raspberry-pi-5"], "llama.cpp", "x.gguf", 1_000_000_000)
    shares = [346e6 * 33 / 17.1e9, 1926e6 * 5.18 / 17.1e9, 1889e6 * 5.79 / 17.1e9, 4060e6 * 2.42 / 17.1e9]
    efficiency = math.prod(shares) ** (1 / 4)
    assert made.efficiency == pytest.approx(efficiency)
    assert made.decode_tok_per_s == pytest.approx(efficiency * 17.1)
    logs = [math.log(s) for s in shares]
    spread = math.sqrt(sum((x - sum(logs) / 4) ** 2 for x in logs) / 3) * math.sqrt(1 + 1 / 4) * 3.18  # Student, 3 degrees of freedom
    assert made.low == pytest.approx(made.decode_tok_per_s / math.exp(spread))
    assert made.high == pytest.approx(made.decode_tok_per_s * math.exp(spread))
    assert made.validated


@pytest.mark.parametrize("runtime", sorted({row.runtime for row in TABLE.published}))
def test_published_rows_are_predicted_from_the_others(runtime: str) -> None:
    """At most 25 % off where three or more rows are there to tell; the rest is called not validated."""
    errors = roofline.leave_one_out(TABLE, runtime)
    said = roofline.trust(TABLE, runtime)
    if len(TABLE.rows_of(runtime)) < 3:
        assert errors == []
        assert said.startswith("not validated")
        return
    assert len(errors) == len(TABLE.rows_of(runtime))
    worst = max(abs(error) for _, error in errors)
    assert worst <= 0.25
    assert f"at most {worst:.0%} off" in said
    assert ("other devices are not" in said) == (len({row.device for row in TABLE.rows_of(runtime)}) == 1)
    for row, error in errors:  # by hand
        rest = [r.efficiency for r in TABLE.rows_of(runtime) if r is not row]
        predicted = math.prod(rest) ** (1 / len(rest)) * TABLE.devices[row.device].bandwidth_gb_per_s * 1e9 / row.bytes_per_token
        assert predicted / row.decode_tok_per_s - 1 == pytest.approx(error)


def test_other_devices_are_predicted_where_several_were_measured() -> None:
    """ExecuTorch was measured on three phones: each from the other two, at most 25 % off."""
    errors = roofline.leave_one_out(TABLE, "executorch", whole_devices=True)
    assert len({row.device for row, _ in errors}) == 3
    assert max(abs(error) for _, error in errors) <= 0.25
    assert roofline.leave_one_out(TABLE, "llama.cpp", whole_devices=True) == []


def test_what_is_less_known_has_a_wider_range() -> None:
    pi, phone = TABLE.devices["raspberry-pi-5"], TABLE.devices["iphone-15-pro"]

    def factor(device: roofline.Device, runtime: str, n_bytes: int = 10**9) -> float:
        made = roofline.estimate(TABLE, device, runtime, "x", n_bytes)
        assert made.low < made.decode_tok_per_s <= made.high <= device.bandwidth_gb_per_s * 1e9 / n_bytes
        return made.decode_tok_per_s / made.low

    assert factor(pi, "llama.cpp") < factor(phone, "llama.cpp") < factor(phone, "litert-lm")
    small = roofline.estimate(TABLE, pi, "llama.cpp", "x", 90_000_000)
    assert factor(pi, "llama.cpp", 90_000_000) == pytest.approx(2 * factor(pi, "llama.cpp"))
    assert not small.validated
    assert small.trust.startswith(
        "not validated at this size, likely too fast: one token reads 90 MB, in the published figures 346 MB or more"
    )
    unknown = roofline.estimate(TABLE, pi, "onnxruntime", "x", 10**9)
    assert not unknown.validated
    assert "no published figure of this runtime" in unknown.trust


def test_every_device_and_row_names_its_source() -> None:
    assert all(len(device.source) > 10 for device in TABLE.devices.values())
    assert all(row.source.startswith("https://") for row in TABLE.published)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"devices": {}}, "devices: missing"),
        ({"devices": {"a": {"bandwidth_gb_per_s": -1, "source": "s"}}}, "devices.a.bandwidth_gb_per_s: -1 is not a number above 0"),
        ({"devices": {"a": {"bandwidth_gb_per_s": 9}}}, "devices.a.source: missing"),
        ({"devices": {"a": 3}}, "devices.a.bandwidth_gb_per_s: None"),
        ({"published": []}, "published: missing"),
        ({"published": [7]}, "published[0].bytes_per_token: None"),
        (
            {"published": [{"runtime": "r", "device": "b", "model": "m", "source": "s", "bytes_per_token": 1, "decode_tok_per_s": 1}]},
            "'b' is not among",
        ),
        (
            {"published": [{"runtime": 1, "device": "a", "model": "m", "source": "s", "bytes_per_token": "1e6", "decode_tok_per_s": 1}]},
            "runtime: 1",
        ),
        (
            {"published": [{"runtime": "r", "device": "a", "model": "m", "source": "s", "bytes_per_token": ".inf", "decode_tok_per_s": 1}]},
            "bytes_per_token",
        ),
    ],
)
def test_a_table_that_cannot_be_used_says_where(change: dict[str, object], words: str, tmp_path: Path) -> None:
    good = {
        "devices": {"a": {"bandwidth_gb_per_s": 9, "source": "data sheet"}},
        "published": [{"runtime": "r", "device": "a", "model": "m", "source": "s", "bytes_per_token": "1e6", "decode_tok_per_s": 10}],
    }
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(good), encoding="utf-8")
    assert roofline.load(path).published[0].efficiency == pytest.approx(1e7 / 9e9)
    path.write_text(yaml.safe_dump({**good, **change}), encoding="utf-8")
    with pytest.raises(DataError) as caught:
        roofline.load(path)
    assert words in caught.value.message


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    with pytest.raises(DataError, match="cannot read"):
        roofline.load(path)
    for content in (b"\xff\xfe\x00", b"a: [", b"[" * 50_000, b"!!python/object/apply:os.system ['true']"):
        path.write_bytes(content)
        with pytest.raises(DataError):
            roofline.load(path)


def test_unknown_names_are_told() -> None:
    with pytest.raises(UsageError) as caught:
        roofline.chosen(TABLE, ["raspbery-pi-5"])
    assert caught.value.message == "no device 'raspbery-pi-5' in the table; did you mean 'raspberry-pi-5'?"
    assert [d.key for d in roofline.chosen(TABLE, ["oneplus-12", "raspberry-pi-5", "oneplus-12"])] == ["oneplus-12", "raspberry-pi-5"]
    assert len(roofline.chosen(TABLE, ["all"])) == len(TABLE.devices)
    with pytest.raises(UsageError, match="no runtime to estimate"):
        roofline.runtime_for(Path("model.safetensors"))
