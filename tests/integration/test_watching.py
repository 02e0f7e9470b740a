"""What a scoring actor writes into its log."""

import logging

from mmray.watching import set_up_log


def test_a_workers_log_holds_no_credentials(monkeypatch, capsys):
    secret = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    ours = logging.getLogger("mmray")
    monkeypatch.setattr(ours, "handlers", [])
    monkeypatch.setattr(ours, "propagate", True)
    monkeypatch.setattr(ours, "level", logging.WARNING)
    set_up_log()
    try:
        raise OSError(f"signed with {secret}")
    except OSError:
        logging.getLogger("mmray.scoring").exception("a shard failed")
    told = capsys.readouterr().err
    assert "a shard failed" in told and "Traceback" in told
    assert secret not in told
