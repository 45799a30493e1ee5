"""Makes fixtures/logs/events.out.tfevents.1.host with TensorBoard's own writer; needs tensorboard, not torch.

python tests/oracles/tensorboard_events.py fixtures/logs
"""

from __future__ import annotations

import sys
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.tensorflow_stub import dtypes
from tensorboard.summary.writer.record_writer import RecordWriter


def main(folder: Path) -> None:
    with (folder / "events.out.tfevents.1.host").open("wb") as file:
        writer = RecordWriter(file)

        def write(step: int, *values: Summary.Value) -> None:
            event = Event(wall_time=1_700_000_000.0 + 10 * step, step=step, summary=Summary(value=values))
            writer.write(event.SerializeToString())

        writer.write(Event(wall_time=1_700_000_000.0, file_version="brain.Event:2").SerializeToString())
        for step in range(1, 6):
            rate = TensorProto(dtype=dtypes.float32.as_datatype_enum, float_val=[0.1 / step])
            write(
                step,
                Summary.Value(tag="train/loss", simple_value=5.0 / step),
                Summary.Value(tag="train/learning_rate", tensor=rate),
                Summary.Value(tag="text", tensor=TensorProto(dtype=7, string_val=[b"no number"])),
            )
        write(5, Summary.Value(tag="val/loss", simple_value=1.5))
        writer.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
