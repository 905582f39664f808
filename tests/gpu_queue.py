"""A GPU's queue of work, for tensors of the CPU that pass for its own."""

import torch


class Queue:
    """The GPU's: what is recorded in it is done once it has come there, or once somebody waits."""

    def __init__(self):
        self.runs, self.step = False, 0
        self.recorded = 0  # events
        self.waits = []  # for events of how many steps ago


class Event:
    def __init__(self, queue):
        self._queue, self._step, self._done = queue, queue.step, False

    def record(self, stream):
        self._queue.recorded += 1

    def query(self):
        return self._done or self._queue.runs

    def synchronize(self):
        if not self.query():
            self._queue.waits.append(self._queue.step - self._step)
        self._done = True


def queue_of(monkeypatch):
    """From now on tensors say that they are on a GPU, which has yet to run what it gets."""
    queue = Queue()
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda t: True))
    monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda t: False))
    monkeypatch.setattr(torch.cuda, "Event", lambda: Event(queue))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return queue
