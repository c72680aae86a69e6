"""Settings come from flags and environment, and what cannot work is refused with the reason."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from allele_operator.settings import Settings


def test_a_flag_wins_over_the_environment_and_the_environment_over_the_default() -> None:
    environ = {"ALLELE_OPERATOR_STATUS_INTERVAL": "5", "ALLELE_OPERATOR_WORKERS": "3"}
    settings = Settings.load(["--workers", "4"], environ)
    assert (settings.status_interval, settings.workers, settings.resync) == (5, 4, 600)


def test_namespaces_repeat_as_flags_and_are_separated_by_commas_in_the_environment() -> None:
    assert Settings.load(["--namespace", "a", "--namespace", "b"], {}).namespace == ("a", "b")
    assert Settings.load([], {"ALLELE_OPERATOR_NAMESPACE": "a,b"}).namespace == ("a", "b")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--lease-duration", "10", "--renew-deadline", "10"], "a healthy leader loses its lease"),
        (["--renew-deadline", "5"], "lease_retry + 2 x lease_timeout"),
        (["--backend", "Swarm"], "'Auto', 'JobSet' or 'Job'"),
        (["--listen", "8080"], "listen"),
        (["--workers", "0"], "greater than or equal to 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(flags: list[str], words: str) -> None:
    with pytest.raises(ValidationError) as e:
        Settings.load(flags, {})
    assert words in str(e.value)


def test_every_setting_tells_what_it_is() -> None:
    assert all(field.description for field in Settings.model_fields.values())
