"""The page of scores: every mark where its score is, nothing from elsewhere, harmless whatever things are called."""

import re

from dllm_ray.viz.scores import PlotRow, page

EVIL = "</svg></title><script>alert(1)</script>&\"'"


def test_marks_stand_at_their_scores_and_are_told_to_screen_readers():
    text = page("T", {"GSM8K": [PlotRow("a", 70.0, 2.0, 69.4, 74.7)]}, [{"model": "a"}], [], [])
    assert re.findall(r'<svg x="([\d.]+)%" [^>]*><title>(\w+)', text) == [
        ("69.40", "official"),
        ("74.70", "reproduced"),
        ("70.00", "ours"),
    ]
    assert 'x1="68.00%" x2="72.00%"' in text
    assert 'aria-label="a: ours 70.0 % &#177; 2.0, official 69.4 %, reproduced 74.7 %"' in text


def test_an_error_bar_ends_where_scores_end():
    text = page("T", {"t": [PlotRow("a", 99.5, 2.0)]}, [{"model": "a"}], [], [])
    assert 'x1="97.50%" x2="100.00%"' in text


def test_without_a_score_in_percent_there_is_no_plot():
    text = page("T", {}, [{"model": "a", "ours": "43.2"}], ["a note"], [])
    assert "<svg" not in text and "43.2" in text and "a note" in text


def test_names_can_not_leave_their_place_and_nothing_is_loaded():
    text = page(EVIL, {EVIL: [PlotRow(EVIL, 1.0)]}, [{EVIL: EVIL}], [EVIL], [{"source": EVIL}])
    assert "<script" not in text and "http://" not in text and "https://" not in text and "url(" not in text
    assert "default-src 'none'" in text
