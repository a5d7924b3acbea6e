"""What keeps a long run safe: state on disk when it is stopped, and an end where numbers end.

    with Guard(out, parameters, device, save) as guard:
        for step in ...:
            ... backward ...
            guard.watch(step, batches, totals, norm)    # on the device; nothing waits
            with guard.update(step + 1):
                optimizer.step()
            if logging:
                guard.check()                           # waits; InputError: not finite
            if guard.due() or saving:
                guard.save(step + 1)
"""
import contextlib
import signal
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist

import runtime
from extras.check import gathered
from runtime import InputError

SECONDS = 600                   # longest time without a new resume.pt


class Guard:
    """Saves at least every SECONDS, and on SIGTERM, Ctrl-C and an error; stops at NaN.

    out: folder of the run. parameters: what is trained. save(done): writes resume.pt after `done`
    steps; it is called on all processes at once, but after an error by each for itself.
    """

    def __init__(self, out: Path, parameters: list, device: torch.device, save):
        self.out, self.parameters, self.save_state = out, parameters, save
        self.first = torch.full((2,), -1, dtype=torch.int64, device=device)     # loss, gradient
        self.ids, self.done, self.saved, self.signal = {}, None, time.time(), None
        self.stopping, self.skipped, self.group = False, set(), None
        if runtime.world() > 1:                         # answers of processes, beside any GPU
            self.group = dist.new_group(backend="gloo")
        self.handlers = {}

    # ---- numbers

    def watch(self, step: int, batches: list[dict], losses: torch.Tensor,
              norm: torch.Tensor) -> None:
        """Note whether this step's losses and gradient are finite, without waiting for a GPU."""
        self.ids[step] = [name for batch in batches for name in batch["ids"]]
        self.skipped |= {name for batch in batches for name in batch["skipped"]}
        bad = ~torch.stack([losses.isfinite().all(), norm.isfinite().all()])
        self.first = torch.where(bad & (self.first < 0), step, self.first)

    def check(self) -> None:
        """InputError: a loss, a gradient or a trained weight is not finite; nothing is saved."""
        loss, gradient = self.first.tolist()
        if max(loss, gradient) >= 0:
            self.done = None                            # what there is now is not worth keeping
            step = min(step for step in (loss, gradient) if step >= 0)
            what = "loss" if loss == step else "gradient"
            ids = self.ids.get(step, [])
            raise InputError(self.stopped(
                f"step {step + 1}: the {what} is not finite; its records: {', '.join(ids[:40])}"
                + f" and {len(ids) - 40} more" * (len(ids) > 40)))
        self.ids.clear()

    def check_whole(self) -> None:
        """`check`, and InputError: a trained weight is not finite."""
        self.check()
        own = [p.to_local() if hasattr(p, "to_local") else p for p in self.parameters]
        if not all(p.detach().isfinite().all() for p in own):
            self.done = None
            raise InputError(self.stopped("a trained weight is not finite"))

    def refuse(self, step: int, values: dict) -> dict:
        """The values. InputError: one of them, a mean loss, is not finite."""
        for name, value in values.items():
            if value is not None and not abs(value) < float("inf"):
                self.done = None
                raise InputError(self.stopped(f"step {step}: {name} is not finite"))
        return values

    def tell_skipped(self) -> None:
        """Say which records --skip-bad has passed over when their images were decoded."""
        names = sorted(set(gathered(list(self.skipped))))
        if names:
            runtime.log(f"{len(names)} records had images that could not be decoded and were"
                        f" skipped: {', '.join(names[:20])}" + " ..." * (len(names) > 20))

    def stopped(self, why: str) -> str:
        """The message."""
        kept = self.out / "resume.pt"
        rest = f"; {kept} is of an earlier step" if kept.exists() else ""
        return f"{why}; the run is stopped, try a lower --lr or look at these records{rest}"

    # ---- state on disk

    @contextlib.contextmanager
    def update(self, done: int):
        """Around an update of the weights: an error in it leaves nothing whole."""
        self.done = None
        yield
        self.done = done

    def due(self) -> bool:
        """Whether to save now, by a clock or a signal; the same on all processes, which all ask."""
        wish = torch.tensor([self.signal is not None, time.time() - self.saved > SECONDS])
        if self.group:
            wish = wish.int()
            dist.all_reduce(wish, dist.ReduceOp.MAX, group=self.group)
        self.stopping = bool(wish[0])
        return bool(wish.any())

    def save(self, done: int) -> None:
        """resume.pt after `done` steps, if the weights are finite. Then stop, if asked to."""
        self.check_whole()
        self.save_state(done)
        self.saved = time.time()
        if self.stopping:
            self.done = None                            # it is saved
            number = self.signal or signal.SIGTERM
            runtime.log(f"stopped by {signal.Signals(number).name} after step {done};"
                        f" {self.out / 'resume.pt'} is written, --resume goes on from it")
            raise SystemExit(128 + number)

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self.handlers[number] = signal.signal(number, self.asked)
        return self

    def asked(self, number, frame) -> None:
        """A signal is answered after the step; the second Ctrl-C at once."""
        if number == signal.SIGINT == self.signal:
            raise KeyboardInterrupt
        self.signal = number

    def __exit__(self, kind, error, trace) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        sharded = any(hasattr(p, "to_local") for p in self.parameters)
        if error is None or self.done is None or sharded:
            return
        with contextlib.suppress(Exception):            # the error itself is what counts
            self.check_whole()
            self.save_state(self.done)
            runtime.log(f"{self.out / 'resume.pt'} is written, of step {self.done}: --resume goes"
                        " on from it")
