"""Names and ratios in tables of simulated caches."""

import pytest

from kvtuner_tools.bench.tables.simulated import is_ours, method_name, ratio, rows_of


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("simulated kivi:2:128", "KIVI, 2 bits, residual 128"),
        ("simulated kvtuner:profile_3.00bit", "**`profile_3.00bit`**"),
        ("simulated kvtuner:profile_3.00bit:K4V2", "**K4V2, round feedback**"),
        ("simulated kvtuner:profile_3.00bit:K3V2", "**K3V2, round feedback; no page yet**"),
        ("simulated kvtuner:K4V2", "**K4V2, no data**"),
        ("simulated snapkv:0.5:kvtuner:profile:K4V4", "SnapKV, 0.5 of tokens, as **K4V4, round feedback**"),
        ("simulated think:0.4:4", "ThinK, 0.4 of key channels, the rest as KIVI, 4 bits"),
        ("simulated fp8:scaled", "fp8 with calibrated scales"),
    ],
)
def test_names(label, name):
    assert method_name(label) == name


def test_what_is_served_with_calibration_is_ours():
    labels = ("kvtuner:profile", "kvtuner:profile:K4V2", "kvtuner:profile:K3V3", "kvtuner:K4V2", "kivi:2:128")
    assert [is_ours(f"simulated {label}") for label in labels] == [True, True, False, False, False]


def test_ratios_are_paired():
    """Blocks that all are twice the others' leave no error."""
    mine, theirs = {"kl_blocks": [2.0, 4.0, 8.0]}, {"kl_blocks": [1.0, 2.0, 4.0]}
    assert ratio(mine, theirs) == (2.0, 0.0)
    value, error = ratio({"kl_blocks": [2.0, 4.0, 9.0]}, theirs)
    assert value == pytest.approx(15 / 7)
    # Rests of -1/7, -2/7 and 3/7 about 0, over three blocks of mean 7/3.
    assert error == pytest.approx(((1 + 4 + 9) / 49 / 2) ** 0.5 / 3**0.5 / (7 / 3))


def test_rows_stand_beside_the_nearest_bits():
    def score(label, bits, blocks):
        at = {"8192": bits + 0.1}
        mean = sum(blocks) / len(blocks)
        return {"label": f"simulated {label}", "stored_bits": bits, "stored_bits_at": at, "kl_mean": mean,
                "kl_blocks": blocks, "perplexity": 9.0}  # fmt: skip

    rows = rows_of(
        [
            {"label": "kvtuner:K4V4", "kl_mean": 1.0},
            score("kvtuner:p:K4V4", 4.5, [0.001, 0.003]),
            score("kvtuner:p:K2V2", 2.5, [0.01, 0.03]),
            score("kivi:2:128", 3.0, [0.04, 0.12]),
        ]
    )
    assert [row[0] for row in rows] == [
        "**K2V2, round feedback**",
        "KIVI, 2 bits, residual 128",
        "**K4V4, round feedback**",
    ]
    assert rows[1][4] == "4.00 ± 0.00 of 2.60"
    assert rows[0][4] == "-"
    assert rows[1][3] == "0.0800 ± 0.0400"
