"""Inputs: files, folders, patterns, videos."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from d2dense.errors import UserError
from d2dense.inference.sources import expand, frames, open_video


def test_folder_gives_its_pictures_sorted(photo_folder):
    assert [source.name for source in expand([photo_folder])] == ["a.jpg", "b.png", "c.PNG"]


def test_patterns_files_and_repeats(photo_folder):
    (photo_folder / "deep").mkdir()
    (photo_folder / "b.png").rename(photo_folder / "deep" / "a.jpg")
    found = expand([photo_folder / "a.jpg", str(photo_folder / "**" / "*.jpg")])
    assert [source.path.parent.name for source in found] == ["photos", "deep"]
    assert [source.name for source in found] == ["a.jpg", "a_2.jpg"]


def test_brackets_in_an_existing_name_are_no_pattern(tmp_path):
    path = tmp_path / "a[1].jpg"
    path.write_bytes(b"")
    assert [source.path for source in expand([path])] == [path]


def test_missing_file_is_kept_for_its_error(tmp_path):
    assert [source.name for source in expand([tmp_path / "no.jpg"])] == ["no.jpg"]


def test_nothing_found_is_the_users_mistake(tmp_path):
    with pytest.raises(UserError, match="no file matches"):
        expand([tmp_path / "*.jpg"])
    with pytest.raises(UserError, match="holds no picture"):
        expand([tmp_path])


def test_video_frames(tmp_path):
    path = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (32, 24))
    for value in (0, 100, 200):
        writer.write(np.full((24, 32, 3), value, np.uint8))
    writer.release()
    video = open_video(path)
    assert (video.announced, video.fps) == (3, 10)
    means = [frame.mean() for frame in frames(video)]
    assert np.allclose(means, (0, 100, 200), atol=4)
    assert not video.capture.isOpened()


def test_unreadable_videos(tmp_path):
    (tmp_path / "bad.mp4").write_bytes(b"nothing of a video")
    with pytest.raises(UserError, match=r"bad\.mp4"):
        open_video(tmp_path / "bad.mp4")
    with pytest.raises(UserError, match="no such file"):
        open_video(tmp_path / "none.mp4")
