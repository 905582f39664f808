"""What fastgpt reads, called in a process of its own: what became of it, in words."""

import os
import resource

CODE_RAN = "code of a file ran"


def limited():
    """Lets no file take the machine's memory."""
    with open("/proc/self/statm") as sizes:
        now = int(sizes.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + (1 << 30), resource.RLIM_INFINITY))


def load(path, cfg):
    """Loads weights into a new model and into an existing one, which a failure leaves as it was."""
    import torch

    import fastgpt

    limited()
    torch.set_num_threads(1)
    before = fastgpt.GPTModel(cfg)
    kept = {name: t.clone() for name, t in before.state_dict().items()}
    said = []
    for act in (
        lambda: fastgpt.GPTModel.from_pretrained(path, None),
        lambda: fastgpt.load_weights(before, path),
    ):
        try:
            act()
            said.append("")
        except (fastgpt.WeightsError, FileNotFoundError) as error:
            said.append(str(error))
        except MemoryError:  # a damaged length may ask for more than there is
            said.append("out of memory")
    if said[1] and "quantised" not in said[1]:
        assert all(torch.equal(t, kept[name]) for name, t in before.state_dict().items())
    return said


def command(arguments, steps=None):
    """Runs the command, which may end with a line and 1 or 2."""
    import torch

    from fastgpt import cli
    from fastgpt.training import trainer

    limited()
    torch.set_num_threads(1)
    trainer.peak = lambda device, autocast: 1e12
    return cli.main(arguments)


class Hostile:
    """What a pickle calls when it is loaded by one that runs code."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)
