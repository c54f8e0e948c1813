"""Hooks come and go while other threads run the same model and go through its dictionaries of hooks."""

from __future__ import annotations

import copy
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.contract import images, untouched, vit
from torch import nn

from captum_lnstat.attribution.gradcam import GradCam
from captum_lnstat.recording import hooks
from captum_lnstat.recording.hooks import Hooks
from captum_lnstat.recording.recorder import Recorder

DICTIONARIES = ("_forward_pre_hooks", "_forward_hooks", "_forward_hooks_always_called")


def nothing(*_: Any) -> None:
    """A hook that changes nothing."""


def dictionaries(module: nn.Module) -> list[Any]:
    return [getattr(module, name) for name in DICTIONARIES]


@pytest.fixture
def hurried() -> Iterator[None]:
    """Threads take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def test_what_is_being_gone_through_does_not_change() -> None:
    """A dictionary that torch was going through when a recorder came, stayed, or left."""
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2)))
    for module in model.modules():
        for _ in range(6):
            module.register_forward_pre_hook(nothing)
            module.register_forward_hook(nothing, always_call=True)
    begun: list[Any] = []

    def begin() -> None:
        for module in model.modules():
            for held in dictionaries(module):
                begun.extend(iter(form) for form in (held, held.items(), held.values()))
        for one in begun:
            next(one)

    begin()
    with Recorder(model):
        begin()
        with Recorder(model):
            begin()
        begin()
    for one in begun:
        next(one)  # a changed dictionary raises here


@pytest.mark.parametrize("order", ["nested", "crossed"])
def test_two_recorders_at_once(order: str) -> None:
    model, ran = nn.Sequential(nn.Linear(2, 2)), list[str]()
    own = dictionaries(model)
    first, second = Hooks(), Hooks()
    first.add(model, after=lambda *_: ran.append("first"))
    second.add(model, after=lambda *_: ran.append("second"))
    leaving = [second, first] if order == "nested" else [first, second]
    model(torch.zeros(2))
    leaving[0].remove()
    model(torch.zeros(2))
    leaving[1].remove()
    model(torch.zeros(2))
    assert ran == ["first", "second", "first" if order == "nested" else "second"]
    assert all(one is another for one, another in zip(dictionaries(model), own, strict=True))


def test_hooks_of_the_user_that_come_and_go_meanwhile() -> None:
    """They run as they would, in their order, and each handle takes its own one off, then and later."""
    model, ran = nn.Sequential(nn.Linear(2, 2)), list[str]()

    def says(word: str) -> Any:
        return lambda *_: ran.append(word)

    def runs() -> list[str]:
        ran.clear()
        model(torch.zeros(2))
        return list(ran)

    early, other = model.register_forward_hook(says("early")), model.register_forward_hook(says("other"))
    hooks = Hooks()
    hooks.add(model, says("ours before"), says("ours"))
    assert runs() == ["ours before", "early", "other", "ours"]
    early.remove()
    late = model.register_forward_hook(says("late"), always_call=True)
    first = model.register_forward_pre_hook(says("first"), prepend=True)
    ahead = model.register_forward_hook(says("ahead"), prepend=True, with_kwargs=True)
    assert runs() == ["first", "ours before", "ahead", "other", "late", "ours"]
    ahead.remove()
    assert runs() == ["first", "ours before", "other", "late", "ours"]
    hooks.remove()
    assert runs() == ["first", "other", "late"]
    late.remove()
    first.remove()
    assert runs() == ["other"]
    other.remove()
    assert runs() == []
    assert all(type(held) is type(nn.Linear(1, 1)._forward_hooks) and not held for held in dictionaries(model))


def test_a_copy_made_meanwhile_has_the_hooks_of_the_user_alone() -> None:
    model, ran = nn.Sequential(nn.Linear(2, 2)), list[str]()
    model.register_forward_hook(lambda *_: ran.append("user"))
    hooks = Hooks()
    hooks.add(model, after=lambda *_: ran.append("ours"))
    model.register_forward_hook(lambda *_: ran.append("late"))
    copies = [copy.deepcopy(model)]
    hooks.remove()
    copies.append(copy.deepcopy(model))
    for one in copies:
        ran.clear()
        one(torch.zeros(2))
        assert ran == ["user", "late"]
        assert type(one._forward_hooks) is type(nn.Linear(1, 1)._forward_hooks)


def test_an_error_runs_what_is_always_called() -> None:
    model, ran = nn.Sequential(nn.Linear(2, 2)), list[str]()
    hooks = Hooks()
    hooks.add(model, after=lambda *_: ran.append("after"))
    with pytest.raises(RuntimeError):
        model(torch.zeros(3))
    hooks.remove()
    assert ran == ["after"]


def test_grad_cam_leaves_the_dictionaries_as_they_are() -> None:
    model = vit()
    layer: nn.Module = model.blocks[-1].norm1
    own = dictionaries(layer)
    seen: list[bool] = []
    handle = layer.register_forward_hook(lambda *_: seen.append(layer._forward_hooks is own[1]))
    going = iter(own[1])
    with untouched(model):
        GradCam(model, model).attribute(images(), 1)
    assert next(going) == handle.id
    assert seen[-1] is False
    assert all(one is another for one, another in zip(dictionaries(layer), own, strict=True))


def test_threads_that_raise_while_others_come_and_go(hurried: None) -> None:
    """Torch goes through the hooks of every module on the way that an error takes; recorders come and go meanwhile."""
    model = nn.Sequential(*[nn.Sequential(nn.Linear(2, 2)) for _ in range(8)])
    for module in model.modules():
        for _ in range(8):
            module.register_forward_hook(nothing)
    wrong: list[BaseException] = []
    end = time.monotonic() + 1.2

    def raising() -> None:
        while time.monotonic() < end and not wrong:
            try:
                model(torch.zeros(3))
            except RuntimeError as error:
                if "mat" not in str(error):
                    wrong.append(error)

    def recording() -> None:
        while time.monotonic() < end and not wrong:
            with torch.no_grad(), Recorder(model):
                pass

    with untouched(model):
        threads = [threading.Thread(target=work) for work in (raising, recording) * 4]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert not wrong


@pytest.mark.filterwarnings("ignore:.*fork")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_process_that_is_forked_while_the_lock_is_held_does_not_wait_for_it() -> None:
    with hooks._lock:
        child = os.fork()
        if child == 0:
            free = hooks._lock.acquire(timeout=5)
            os._exit(0 if free else 1)
    _, status = os.waitpid(child, 0)  # the child ends in five seconds at most
    assert os.waitstatus_to_exitcode(status) == 0
