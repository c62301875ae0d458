"""Run folders: nothing saved is written over, resume finds the newest, config.yaml tells everything."""

import argparse
import os

import pytest
import yaml

from scalesnn import neuron, surrogate
from scalesnn.base import UserError
from scalesnn.training.run_folder import choose_folder, describe_run, write_config


def choose(folder, **given):
    return choose_folder(str(folder), "net", **{"resume": None, "clean": False, **given})


def test_a_taken_name_gets_a_number(tmp_path):
    for expected in ("net", "net-2", "net-3"):
        chosen = choose(tmp_path)
        assert chosen.name == expected
        chosen.mkdir()
        (chosen / "config.yaml").touch()


def test_a_run_that_was_refused_leaves_its_name_to_the_next(tmp_path):
    (tmp_path / "net" / "logs").mkdir(parents=True)
    assert choose(tmp_path).name == "net"


def test_numbers_are_counted_not_spelt(tmp_path):
    for name in ("net", "net-9", "net-10", "network-77"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").touch()
    assert choose(tmp_path).name == "net-11"
    assert choose(tmp_path, resume="latest").name == "net-10"


def test_resume_latest_with_nothing_there_is_a_fresh_folder(tmp_path):
    assert choose(tmp_path, resume="latest").name == "net"


def test_resume_of_a_path_goes_on_in_its_folder_only_below_the_same_output(tmp_path):
    checkpoint = tmp_path / "a" / "net-4" / "checkpoints" / "step_00000007"
    checkpoint.mkdir(parents=True)
    assert choose(tmp_path / "a", resume=str(checkpoint)) == tmp_path / "a" / "net-4"
    assert choose(tmp_path / "b", resume=str(checkpoint)) == tmp_path / "b" / "net"


def test_clean_deletes_only_this_name(tmp_path):
    for name in ("net", "net-2", "network"):
        (tmp_path / name).mkdir()
    assert choose(tmp_path, clean=True).name == "net"
    assert [p.name for p in tmp_path.iterdir()] == ["network"]


def test_an_output_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--output-dir"):
        choose(tmp_path / "file" / "runs")


def test_config_tells_settings_neurons_surrogates_and_versions(tmp_path):
    node = neuron.LIFNode(tau=3.0, v_threshold=0.7, surrogate_function=surrogate.ATan(alpha=4.0))
    config = describe_run(argparse.Namespace(lr=0.1, model="net", explicit={"lr"}), node, strategy="single")
    write_config(tmp_path, config)
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert written == config
    assert written["settings"] == {"lr": 0.1, "model": "net"}
    (entry,) = written["neurons"]
    assert entry["type"] == "LIFNode"
    assert "tau=3.0" in entry["settings"]
    assert "0.7" in entry["settings"]
    assert "alpha=4.0" in entry["surrogate"]
    assert written["versions"]["torch"]


def test_a_resumed_run_keeps_the_earlier_config(tmp_path):
    for lr in (0.1, 0.1, 0.2, 0.3):
        write_config(tmp_path, {"lr": lr})
    assert sorted(os.listdir(tmp_path)) == ["config.1.yaml", "config.2.yaml", "config.yaml"]
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == {"lr": 0.3}
