"""The sizes of a notebook: what a rung sets, what a hand sets, and what is shown before it starts."""

import pytest

import vgglab
from vgglab.view.ladder import Ladder

LADDER = Ladder(
    model=("vgg11_bn", "vgg16_bn", "vgg<16>"), epochs=(2, 6, 90), seconds=(75, None, None), timed_on="a laptop"
)


@pytest.mark.parametrize(("profile", "chosen"), [("quick", ["vgg11_bn", 2]), ("full", ["vgg<16>", 90])])
def test_a_rung_sets_what_is_not_set_by_hand(profile, chosen):
    assert LADDER.choose(profile, model=None, epochs=None) == chosen
    assert LADDER.choose(profile, model=None, epochs=0) == [chosen[0], 0]


def test_it_is_shown_with_the_time_as_text_and_as_html(capsys):
    LADDER.choose("quick", model="mine", epochs=None)
    text = capsys.readouterr().out
    assert "quick, chosen" in text
    assert "mine (set by hand)" in text
    assert "1 min 15 s" in text
    assert "nobody has timed it" in text
    assert "Timed on a laptop. What was set by hand changes the time." in text


def test_the_table_is_html_in_a_notebook(monkeypatch):
    display = pytest.importorskip("IPython.display")
    shown = []
    monkeypatch.setattr(display, "display", shown.append)
    LADDER.choose("full", epochs=None)
    (table,) = shown
    assert "vgg&lt;16&gt;" in table._repr_html_()
    assert "full, chosen" in table._repr_html_()


def test_another_profile_is_refused_by_name():
    with pytest.raises(vgglab.UserError, match="profile: 'fast' is not one of quick, small, full"):
        LADDER.choose("fast", model=None)
