"""One rank of a run: `torchrun --nproc-per-node N -m ckpttools.trainer CONFIG [options]`."""

from ckpttools.trainer.worker import main

if __name__ == "__main__":
    main()
