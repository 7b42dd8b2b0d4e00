# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""An archive has one row for each image with the scores of ``anomalib predict``, whatever fails on the way."""

import csv
import errno
import json
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from contextlib import nullcontext, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from anomalib.engine import Engine
from PIL import Image

from anomalib_mvfa import MVFA
from anomalib_mvfa.data import FewShot, MedicalFolder
from anomalib_mvfa.data.readers import UnreadableImageError, read_volume
from anomalib_mvfa.deploy import archive
from anomalib_mvfa.deploy.archive import Counts, Resources, predict_archive
from anomalib_mvfa.deploy.archive_files import Isolated, pack

ray = pytest.importorskip("ray")
nibabel = pytest.importorskip("nibabel")
pydicom = pytest.importorskip("pydicom")
psutil = pytest.importorskip("psutil")
pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

IMAGES = 200
PATIENT = "Zweifelsohne^Amalthea"
# What some files do to the process that decodes them; production code has no such place.
FAULTS = """
import os, signal, time
import PIL.Image

real = PIL.Image.open

def faulty(file, *arguments, **options):
    if "crashes" in str(file):
        os.kill(os.getpid(), signal.SIGSEGV)
    if "endless" in str(file):
        time.sleep(3600)
    time.sleep(0.02)
    return real(file, *arguments, **options)

PIL.Image.open = faulty
"""


def write_dicom(path, series, number, pixels):
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = pydicom.uid.MRImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = f"{series}.{number}"
    dataset.SeriesInstanceUID, dataset.PatientName, dataset.PatientID = series, PATIENT, "QX-4711-ZZ"
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
    dataset.SamplesPerPixel, dataset.PixelRepresentation, dataset.InstanceNumber = 1, 0, number
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.PixelData = pixels.astype(np.uint16).tobytes()
    pydicom.dcmwrite(path, dataset, enforce_file_format=True)


@pytest.fixture(scope="module")
def model(make_folder_in, small_backbone, tmp_path_factory):
    """A trained checkpoint, and beside it the exported graph."""
    root = tmp_path_factory.mktemp("model")
    source = make_folder_in(root / "data", 12, 8)
    source.test_split_ratio = 0.5
    torch.manual_seed(0)
    mvfa = MVFA(small_backbone, "random", class_name="Brain", visualizer=False)
    engine = Engine(max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=root)
    engine.fit(mvfa, datamodule=FewShot(source, k_shot=1))
    engine.trainer.save_checkpoint(root / "model.ckpt")
    mvfa.to_openvino(root).rename(root / "model.xml")
    next(root.rglob("model.bin")).rename(root / "model.bin")
    return root / "model.ckpt"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """PNG of 8 and 16 bits in folders, a DICOM series without window, a volume with empty slices, damaged files."""
    root, rng = tmp_path_factory.mktemp("source"), np.random.default_rng(3)
    for index in range(IMAGES):
        pixels = rng.integers(0, 90, (40, 48)).astype(np.uint8)
        pixels[: index % 40] //= 2
        path = root / "png" / f"{index % 4}" / f"{index:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    Image.fromarray(rng.integers(0, 4000, (56, 56)).astype(np.uint16)).save(root / "wide.png")
    for series in (1, 2):
        (root / f"mr{series}").mkdir()
        for number in (1, 2):  # of which the second is darker: grey levels are those of the whole series
            pixels = rng.integers(0, 2000 // number, (30, 30))
            write_dicom(root / f"mr{series}" / f"{number}.dcm", f"1.2.3.{series}", number, pixels)
    volume = np.zeros((20, 22, 5), np.float32)
    volume[..., 1:4] = rng.random((20, 22, 3)) * [1, 2, 3]
    nibabel.save(nibabel.Nifti1Image(volume, np.diag([-1, 1, 2, 1])), root / "ct.nii.gz")
    (root / "truncated.png").write_bytes((root / "wide.png").read_bytes()[:500])
    (root / "text.png").write_text("no image", encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def expected(source, model, tmp_path_factory):
    """The rows of ``predictions.csv``, by path."""
    root = tmp_path_factory.mktemp("expected")
    engine = Engine(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=root)
    data = MedicalFolder(source, num_workers=0)
    engine.predict(MVFA.load_from_checkpoint(model), datamodule=data, return_predictions=False)
    table = next(root.rglob("predictions.csv"))
    with table.open(encoding="utf-8", newline="") as file:
        return {row["path"]: row for row in csv.DictReader(file)}


def rows_of(out):
    """Return the rows by path, each of which is there once."""
    rows = [row for part in sorted((out / "parts").iterdir()) for row in parquet.read_table(part).to_pylist()]
    assert max(Counter(row["path"] for row in rows).values()) == 1
    return {row["path"]: row for row in rows}


def assert_equal(rows, expected, tolerance=1e-6):
    assert rows.keys() == expected.keys()
    for path, row in rows.items():
        wanted = expected[path]
        assert (row["error"] or "") == wanted["error"]
        if row["error"]:
            assert [row[name] for name in ("score", "raw_score", "label", "area")] == [None] * 4
        else:
            assert row["score"] == pytest.approx(float(wanted["score"]), abs=tolerance)
            assert row["label"] == int(wanted["label"])
            assert row["area"] == pytest.approx(float(wanted["abnormal_area"]), abs=max(tolerance, 2e-6))
    pairs = [(row["group"], expected[path]["group"]) for path, row in rows.items() if not row["error"]]
    assert len(set(pairs)) == len({ours for ours, _ in pairs}) == len({theirs for _, theirs in pairs})


def predict_here(source, out, model, **options):
    """Predict without Ray: the stages of the pipeline one after the other, in this process."""

    def run(data, chunks, parts, predictor, use):
        del data
        predict = archive._Predictor(*predictor)
        read = archive._Reader(parts.options, use.batch)
        for chunk in chunks:
            for batch in read({name: [value] for name, value in chunk.items()}):
                columns = predict(batch)
                for values in zip(*columns.values(), strict=True):
                    parts.add(dict(zip(columns, values, strict=True)))
        parts.flush()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(archive, "_run", run)
        patch.setattr(archive, "_cluster", lambda _: nullcontext())
        return predict_archive(str(source), out, model, **options)


def test_checkpoint_has_the_scores_labels_areas_and_groups_of_anomalib_predict(source, model, expected, tmp_path):
    counts = predict_here(source, tmp_path, model)
    rows = rows_of(tmp_path)
    assert_equal(rows, expected)
    assert counts == Counts(len(expected), 2, 1)
    # The raw score is the one before normalisation.
    mvfa = MVFA.load_from_checkpoint(model).eval()
    some = [path for path, row in rows.items() if not row["error"]][:20]
    raw = torch.tensor([rows[path]["raw_score"] for path in some])
    post = mvfa.post_processor
    normalised = post._normalize(raw, post.image_min, post.image_max, post.image_threshold)
    assert normalised.tolist() == pytest.approx([rows[path]["score"] for path in some], abs=1e-6)
    assert float((raw - normalised).abs().min()) > 1e-4


def test_heatmaps_are_written_only_where_asked_and_above_a_score(source, model, expected, tmp_path):
    predict_here(source / "png" / "0", tmp_path / "none", model)
    assert not (tmp_path / "none" / "heatmaps").exists()
    scores = sorted(float(row["score"]) for path, row in expected.items() if "ct.nii.gz" in path)
    limit = (scores[0] + scores[1]) / 2
    predict_here(source, tmp_path / "some", model, heatmaps=limit)
    rows = rows_of(tmp_path / "some")
    above = {path for path, row in rows.items() if row["score"] is not None and row["score"] > limit}
    drawn = {path for path in above if "nii.gz" not in path}
    names = {f"{Path(path).relative_to(source).as_posix()}.png" for path in drawn}
    folder = tmp_path / "some" / "heatmaps"
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*.png")} == names
    slices = {int(path.partition("#")[2]) for path in above - drawn}
    assert len(slices) == 2
    assert 0 < len(drawn) < IMAGES
    maps = read_volume(folder / "ct.nii.gz_anomaly.nii.gz")[0]
    assert {index for index in range(5) if maps[..., index].any()} == slices
    assert np.array_equal(
        nibabel.load(folder / "ct.nii.gz_anomaly.nii.gz").affine, nibabel.load(source / "ct.nii.gz").affine
    )


def test_lists_and_object_stores_have_the_rows_of_the_folder(source, model, expected, tmp_path):
    table = {"path": [path for path in expected if "#" not in path] + [str(source / "ct.nii.gz")]}
    table["group"] = [f"patient {index % 3}" for index in range(len(table["path"]))]
    table["path"] += table["path"][:5]  # twice: one row each
    table["group"] += table["group"][:5]
    listed = tmp_path / "list.parquet"
    parquet.write_table(pa.table(table), listed)
    predict_here(listed, tmp_path / "listed", model)
    rows = rows_of(tmp_path / "listed")
    assert rows.keys() == expected.keys()
    assert len({row["group"] for row in rows.values() if not row["error"]}) == 3
    # Through the file systems of pyarrow, as an object store is read; files are copied before they are decoded.
    predict_here(f"file://{source}", tmp_path / "stored", model)
    stored = {path.removeprefix("file://"): row for path, row in rows_of(tmp_path / "stored").items()}
    assert_equal(stored, expected)


def test_csv_list_names_missing_files_in_their_rows(source, model, tmp_path):
    (tmp_path / "list.csv").write_text(f"path,note\n0012.png,x\n{source / 'wide.png'},y\n", encoding="utf-8")
    predict_here(tmp_path / "list.csv", tmp_path / "out", model)
    rows = rows_of(tmp_path / "out")
    assert rows[str(tmp_path / "0012.png")]["error"] == "no such file"
    assert rows[str(source / "wide.png")]["error"] is None
    (tmp_path / "list.csv").write_text("file\nx.png\n", encoding="utf-8")
    with pytest.raises(ValueError, match="needs a column 'path'; it has file"):
        predict_here(tmp_path / "list.csv", tmp_path / "other", model)


def test_done_files_are_left_out_of_the_chunks_and_repeated_ones_marked_once():
    files = [(f"{index}.png", None) for index in range(150)]
    done = np.unique(np.array([archive.digest_of(str(Path("/x", f"{index}.png"))) for index in range(20)], np.uint64))
    chunks, todo = pack(iter([*files, files[30]]), "/x", done)
    assert [int(marks).bit_count() for marks in todo] == [64, 64, 2]  # 130, without the second of number 30
    assert len(chunks) == 3


def test_archive_of_other_options_or_in_use_is_refused(source, model, tmp_path):
    folder = source / "png" / "1"
    predict_here(folder, tmp_path, model)
    with pytest.raises(ValueError, match="another value of heatmaps, intensity"):
        predict_here(folder, tmp_path, model, heatmaps=0.5, intensity="percentile")
    digest = archive._model_facts(model)[2]
    new = tmp_path / "new", {"model": digest}
    with archive._archive(*new), pytest.raises(ValueError, match="Another run"), archive._archive(*new):
        pass
    assert predict_here(folder, tmp_path, model) == Counts()


def test_files_that_are_complete_are_written_when_a_run_is_stopped(source, model, tmp_path, monkeypatch):
    class Stopped:
        """In place of Ray Data: two whole files, one slice of three of another, then Ctrl-C."""

        def from_items(self, chunks, **_):
            paths = {path: place for place, (path, _) in enumerate(json.loads(zlib.decompress(chunks[0]["files"])))}
            row = {"chunk": 0, "group": 7, "error": "", "score": 0.5, "raw_score": 0.1, "label": 1.0, "area": 0.0}
            files = [("png/0/000.png", -1, 1), ("png/0/004.png", -1, 1), ("png/0/008.png", 1, 3)]
            self.rows = [
                {**row, "place": paths[path], "path": path, "frame": frame, "images": images, "map": b""}
                for path, frame, images in files
            ]
            return self

        def map_batches(self, *_, **__):
            return self

        def iter_batches(self, **_):
            yield pa.Table.from_pylist(self.rows)
            raise KeyboardInterrupt

        def ActorPoolStrategy(self, **_):  # noqa: N802 - the name of Ray's
            return None

    few = [f"png/0/{number:03}.png" for number in range(0, 16, 4)]
    (source / "few.csv").write_text("\n".join(["path", *few]), encoding="utf-8")
    monkeypatch.setattr(archive, "_cluster", lambda _: nullcontext(Stopped()))
    with pytest.raises(KeyboardInterrupt):
        predict_archive(str(source / "few.csv"), tmp_path / "out", model)
    names = {Path(path).name for path in rows_of(tmp_path / "out")}
    assert names == {"000.png", "004.png"}


def test_a_local_cluster_leaves_the_process_as_it_was(monkeypatch):
    started = []

    def init(**options):
        started.append((os.environ["TMPDIR"], options["_temp_dir"]))
        signal.signal(signal.SIGTERM, lambda *_: None)  # as Ray does

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setenv("TMPDIR", tempfile.gettempdir())
    before = dict(os.environ), signal.getsignal(signal.SIGTERM)
    with archive._cluster(Resources()):
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    ((inside, folder),) = started
    assert inside == folder != os.environ["TMPDIR"]
    assert not Path(folder).exists()
    assert (dict(os.environ), signal.getsignal(signal.SIGTERM)) == before


def test_memory_and_time_of_a_file_are_limited():
    isolated = Isolated(seconds=1, memory=8 * 2**30)
    with pytest.raises(UnreadableImageError, match="longer than 1 s"):
        isolated.call(endless)
    with pytest.raises(UnreadableImageError, match="more than 8 GiB of memory"):
        isolated.call(large)
    assert isolated.call(str) == isolated._folder.name


def endless(folder):
    time.sleep(100)


def large(folder):
    return np.ones(2 * 2**30)


def test_command_is_reached_by_nobody_and_leaves_and_logs_nothing_of_patients(source, model, tmp_path, request):
    work, out, scratch = tmp_path / "work", tmp_path / "out", Path(tempfile.mkdtemp(prefix="t", dir="/tmp"))  # short
    request.addfinalizer(lambda: shutil.rmtree(scratch))
    work.mkdir()
    command = [sys.executable, "-W", "ignore", "-m", "anomalib_mvfa.deploy.archive", str(source / "mr1"), str(out)]
    environment = {**os.environ, "TMPDIR": str(scratch), "HOME": str(work), "MPLCONFIGDIR": str(tmp_path)}
    with (tmp_path / "log").open("w") as log:
        run = subprocess.Popen(
            [*command, "--model", str(model)], cwd=work, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        listening, logs = set(), b""
        while run.poll() is None:
            with suppress(psutil.Error):
                for process in psutil.Process(run.pid).children(recursive=True):
                    with suppress(psutil.Error):
                        sockets = process.net_connections("inet")
                        listening |= {socket.laddr.ip for socket in sockets if socket.status == psutil.CONN_LISTEN}
            with suppress(OSError):  # folders that are removed while they are listed
                logs = max(logs, b"".join(path.read_bytes() for path in scratch.rglob("*.log")), key=len)
            time.sleep(0.5)
    said = (tmp_path / "log").read_bytes()
    assert run.returncode == 0, said.decode()
    assert listening
    assert {ip.removeprefix("::ffff:") for ip in listening} == {"127.0.0.1"}
    assert b"2 images added, 0 of them unreadable" in said
    assert len(rows_of(out)) == 2
    assert b"_Reader" in logs
    written = b"".join(path.read_bytes() for path in out.rglob("*") if path.is_file())
    assert not any(part in written + said + logs for part in (b"Zweifelsohne", b"Amalthea", b"QX-4711"))
    left = [path for folder in (work, scratch) for path in folder.rglob("*") if path.is_file()]
    assert not left


POD = {
    "type": "object",
    "required": ["containers", "volumes"],
    "additionalProperties": False,
    "properties": {
        "restartPolicy": {"enum": ["Always", "OnFailure", "Never"]},
        "automountServiceAccountToken": {"type": "boolean"},
        "volumes": {"type": "array", "items": {"type": "object", "required": ["name"]}},
        "containers": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["name", "image"],
                "additionalProperties": False,
                "properties": {
                    "name": {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"},
                    "image": {"type": "string"},
                    "env": {"type": "array", "items": {"properties": {"value": {"type": "string"}}}},
                    "resources": {"type": "object"},
                    "volumeMounts": {"type": "array", "items": {"required": ["name", "mountPath"]}},
                },
            },
        },
    },
}
GROUP = {
    "rayStartParams": {"type": "object", "additionalProperties": {"type": "string"}},  # numbers are refused
    "template": {"type": "object", "required": ["spec"], "properties": {"spec": POD}},
}
WORKERS = {
    **GROUP,
    "groupName": {"type": "string"},
    **{name: {"type": "integer", "minimum": 0} for name in ("replicas", "minReplicas", "maxReplicas")},
}
# The fields of RayJob (ray.io/v1) that the manifest uses, as KubeRay's reference describes them.
RAY_JOB = {
    "type": "object",
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "additionalProperties": False,
    "properties": {
        "apiVersion": {"const": "ray.io/v1"},
        "kind": {"const": "RayJob"},
        "metadata": {"type": "object"},
        "spec": {
            "type": "object",
            "required": ["entrypoint", "rayClusterSpec"],
            "additionalProperties": False,
            "properties": {
                "entrypoint": {"type": "string"},
                "submissionMode": {"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
                "shutdownAfterJobFinishes": {"type": "boolean"},
                "rayClusterSpec": {
                    "type": "object",
                    "required": ["headGroupSpec"],
                    "additionalProperties": False,
                    "properties": {
                        "headGroupSpec": {
                            "type": "object",
                            "required": ["template"],
                            "additionalProperties": False,
                            "properties": GROUP,
                        },
                        "workerGroupSpecs": {
                            "type": "array",
                            "items": {
                                "type": "object",
                                "required": ["groupName", "template"],
                                "additionalProperties": False,
                                "properties": WORKERS,
                            },
                        },
                    },
                },
            },
        },
    },
}


def test_manifest_fits_the_fields_of_a_ray_job_and_its_command_the_options():
    jsonschema = pytest.importorskip("jsonschema")
    job = yaml.safe_load((Path(__file__).parents[2] / "examples" / "rayjob.yaml").read_text(encoding="utf-8"))
    jsonschema.validate(job, RAY_JOB)
    cluster = job["spec"]["rayClusterSpec"]
    head, workers = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    for group in (head, *workers):
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert all(mount["name"] in volumes for container in pod["containers"] for mount in container["volumeMounts"])
        assert all(container["env"][0]["value"] == "0" for container in pod["containers"])
    assert head["rayStartParams"]["dashboard-host"] == "127.0.0.1"
    assert head["template"]["spec"]["restartPolicy"] == "Never"  # which SidecarMode requires
    module, *arguments = shlex.split(job["spec"]["entrypoint"].removeprefix("python -m "))
    assert module == archive.__name__
    options = archive._arguments().parse_args(arguments)
    cpus = sum(int(group["rayStartParams"]["num-cpus"]) * group["replicas"] for group in workers)
    assert cpus == options.workers * options.threads + options.readers


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Two machines of two workers' size on this one; what files named 'crashes' and 'endless' do is in effect there."""
    from ray.cluster_utils import Cluster

    folder = tmp_path_factory.mktemp("faults")
    (folder / "sitecustomize.py").write_text(FAULTS, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        memory = 200 * 2**20
        made = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 2, "object_store_memory": memory, "include_dashboard": False},
        )
        made.second = made.add_node(num_cpus=2, object_store_memory=memory)
        ray.init(made.address, log_to_driver=False, logging_level=logging.ERROR)
        yield made
        ray.shutdown()
        made.shutdown()


def workers_named(stage):
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            found += [process] if stage in " ".join(process.cmdline()) else []
    return found


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_every_image_has_one_row_although_disk_workers_files_and_a_machine_fail(
    source, model, expected, cluster, tmp_path, monkeypatch, caplog
):
    """In one archive, whose second run goes on where a full disk ended the first."""
    faulty = {source / "crashes.png": "reading it ended its process (SIGSEGV)", source / "endless.png": "longer than"}
    for path in faulty:
        path.write_bytes((source / "wide.png").read_bytes())
    monkeypatch.setattr(archive, "PART_ROWS", 30)
    monkeypatch.setattr(archive, "BLOCK", 2**18)

    def predict(workers):
        resources = Resources(workers=workers, readers=workers, batch=8)
        return predict_archive(str(source), tmp_path, model.with_suffix(".xml"), resources=resources, seconds=3)

    write = parquet.write_table
    written = []

    def full(table, path):
        if len(written) == 2:
            Path(path).write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        write(table, path)

    monkeypatch.setattr(parquet, "write_table", full)
    try:
        with pytest.raises(OSError, match="No space left"):
            predict(1)
        assert len(list((tmp_path / "parts").iterdir())) == 2  # no half of a third
        before = {path: path.read_bytes() for path in (tmp_path / "parts").iterdir()}
        monkeypatch.setattr(parquet, "write_table", write)

        def disturb():
            wait_for(lambda: len(list((tmp_path / "parts").glob("part-*"))) > 2)
            for stage in ("_Reader", "_Predictor"):
                workers_named(stage)[0].send_signal(signal.SIGKILL)
            wait_for(lambda: len(list((tmp_path / "parts").glob("part-*"))) > 3)
            cluster.remove_node(cluster.second, allow_graceful=False)
            disturbed.append(True)

        disturbed = []
        thread = threading.Thread(target=disturb)
        thread.start()
        caplog.set_level(logging.INFO)
        counts = predict(2)
        thread.join()
        assert disturbed
    finally:
        for path in faulty:
            path.unlink()
    assert all(path.read_bytes() == content for path, content in before.items())
    rows = rows_of(tmp_path)
    assert counts.images == len(rows) - 60
    for path, reason in faulty.items():
        assert reason in rows.pop(str(path))["error"]
    assert_equal(rows, expected, tolerance=1e-5)  # OpenVINO, where the reference is torch
    monkeypatch.setattr(archive, "_cluster", None)
    assert predict_archive(str(source), tmp_path, model.with_suffix(".xml"), seconds=3) == Counts()  # a third run
    assert not any(str(source) in record.getMessage() for record in caplog.records)
