"""What each error and check means and how to mend it: the texts of `ckpt explain ID`.

A test holds that every id which the package can print is here, and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Explanation:
    """`kind` is where the id appears; `meaning` what is wrong and why; `mend` what to do."""

    kind: str
    meaning: str
    mend: str


FILE, ZIP, FOLDER, RANKS, VALUES, INFO, USE, WRITE, TRAIN = (
    "a file",
    "a file's structure",
    "a folder",
    "the files of a ZeRO folder together",
    "values",
    "information",
    "the command could not run",
    "writing",
    "training",
)
AGAIN = "Copy the file again from where it was saved, or use an older checkpoint."
ONE_SAVE = "Copy all files of the folder again, from one save."


def _all() -> dict[str, Explanation]:
    e = Explanation
    return {
        # --- one file
        "file-empty": e(
            FILE, "The file has no bytes. A save that was killed or ran out of disk leaves such files.", AGAIN
        ),
        "file-truncated": e(
            FILE,
            "The file is shorter than its own structure says. torch.load may report this as a vague error about "
            "the central directory, or not at all.",
            AGAIN,
        ),
        "file-appended": e(
            FILE, "Bytes follow the file's own end. Something was appended, or two files were joined.", AGAIN
        ),
        "file-renamed": e(
            FILE,
            "torch.save writes the file's name into the archive. This file carries another one: it was renamed. "
            "If it is the name of another file of the same folder, two files were swapped or one was copied over "
            "another, which DeepSpeed loads without a word.",
            "Rename the files back. If that is not possible: " + ONE_SAVE,
        ),
        "lfs-pointer": e(
            FILE,
            "A git-lfs pointer of about 130 bytes lies where the file should be: the repository was cloned "
            "without its large files.",
            "Run `git lfs pull` in the repository.",
        ),
        "not-a-file": e(
            FILE, "A pipe, a device or a folder lies where a file should be. It is not read.", AGAIN
        ),
        "not-torch": e(
            FILE,
            "The file is neither a zip archive of torch.save nor torch's older serialization.",
            "Check that it is the right file and that its download finished.",
        ),
        "bare-pickle": e(
            FILE,
            "A plain pickle, made by pickle.dump. It holds no tensors in torch's form, and unpickling it could run "
            "anything: ckpt never does.",
            "Save it again with torch.save, from the program that made it.",
        ),
        "big-endian": e(
            FILE,
            "The file was saved on a big-endian machine. Its tensors would have to be swapped byte by byte.",
            "Load and save it once with torch on a little-endian machine.",
        ),
        "no-weights": e(
            FILE,
            "The file is a good torch file, but none of the names under which training code keeps weights holds "
            "named tensors. Optimizer, scheduler and random state files look like this.",
            "Name the file that holds the model.",
        ),
        "text-damaged": e(FILE, "A small text file such as `latest` is not UTF-8 text.", AGAIN),
        "text-too-long": e(FILE, "A small text file such as `latest` is far too long to be one.", AGAIN),
        "name-unsafe": e(
            FILE,
            "A name inside the checkpoint (in `latest` or in an index) leads out of its folder or holds control "
            "characters. It is never followed.",
            "Put the plain name of the tag or shard there.",
        ),
        # --- structure
        "zip-damaged": e(
            ZIP,
            "The archive contradicts itself: headers against directory, gaps, overlaps, duplicates, bytes that "
            "belong to nothing. torch.load checks none of this.",
            AGAIN,
        ),
        "zip-unexplained": e(
            ZIP,
            "torch writes every byte of its archives in one way. Here a header, a padding or a descriptor holds "
            "something else: the file was damaged where no checksum reaches, or another program changed it.",
            AGAIN,
        ),
        "records-edited": e(
            ZIP,
            "torch folds the checksums of all records into one number when it saves. The number does not fit: a record "
            "was changed and its own checksum mended, or records were moved between files. Accidents do not do this.",
            "Get the file again from where it was saved, and ask who edited it.",
        ),
        "zip-other-writer": e(
            INFO,
            "The archive was written by something other than torch.save, such as a script that used Python's "
            "zipfile. It is checked by the general rules of the format.",
            "Nothing to do.",
        ),
        "pickle-damaged": e(
            ZIP, "The pickle that describes the tensors is not well formed, or reaches over a limit.", AGAIN
        ),
        "field-damaged": e(
            ZIP, "A value that the format requires is missing or of the wrong kind; its path is given.", AGAIN
        ),
        "checksum": e(
            ZIP,
            "The bytes are not those that were saved: the CRC-32 in the archive differs. torch writes these "
            "checksums and never checks them, so such a file loads without a word.",
            AGAIN,
        ),
        "safetensors-header": e(
            ZIP,
            "The header of the safetensors file does not fit the file: sizes, offsets, gaps, dtypes.",
            AGAIN,
        ),
        "json-damaged": e(
            ZIP, "A JSON file is not valid, repeats a key, or holds something else than it must.", AGAIN
        ),
        "index-mismatch": e(
            FOLDER,
            "The index of a sharded model and the shards name different tensors: they come from different saves.",
            "Copy the whole folder again from where it was saved.",
        ),
        "link-outside": e(
            FILE,
            "A symbolic link inside the checkpoint leads out of its folder. Links within it are followed, and those "
            "of a Hugging Face cache from snapshots/ to blobs/; others would let a checkpoint from elsewhere choose "
            "which files of this machine are read and copied.",
            "If the link is your own, add --follow-symlinks. Else copy the file itself into the folder.",
        ),
        "storage-compressed": e(
            USE,
            "A storage of a torch file is compressed. torch.save never does that: another tool packed the archive "
            "anew. torch.load reads it (not with mmap); ckpt reads bytes where they lie and does not.",
            "Load the file with torch where you trust it, and save it again with torch.save.",
        ),
        "storage-unfilled": e(
            FILE,
            "The file was saved under torch.serialization.skip_data, which leaves room for the tensors' bytes and "
            "stores no checksums for them. Nothing has filled the room: every tensor would load as zeros.",
            "Fill the storages in, or save the file again without skip_data.",
        ),
        "storage-unchecked": e(
            INFO,
            "The file was saved under torch.serialization.skip_data and its tensors were filled in later. Their "
            "checksums were never computed, so flipped bits in them cannot be seen without a manifest.",
            "Write a manifest while the file is known to be good: ckpt verify --write-manifest.",
        ),
        "key-missing": e(
            FILE,
            "The file says which framework saved it, and lacks a key that this framework saves in every training "
            "checkpoint: its counters, its optimizer, its schedulers.",
            "Use another checkpoint to resume from. The weights can still be extracted.",
        ),
        "training-keys": e(
            INFO,
            "What the file holds for a resume: epoch, step, losses, optimizer and scheduler, and which of these it "
            "does not hold.",
            "Nothing to do, unless you want to resume and miss something.",
        ),
        "manifest-mismatch": e(
            FILE,
            "The file is not what it was when its manifest was written: another size or other bytes, or it is "
            "gone. The tensors whose bytes changed are named.",
            "Restore the file from a copy. If the change was meant, delete the manifest and write it anew with ckpt "
            "verify --write-manifest.",
        ),
        "manifest-damaged": e(
            FILE,
            "The manifest is not one of this version.",
            "Delete it, and write it anew once the checkpoint is known to be good.",
        ),
        "layout-in-parts": e(
            INFO,
            "ZeRO-3, pipeline, tensor- and expert-parallel, universal and distributed checkpoints are verified file by "
            "file: structure, checksums, names, NaN, and that no file is missing. Their weights are not put together, so "
            "that the files belong to one step is not proven.",
            "Nothing to do.",
        ),
        "manifest-unlisted": e(
            INFO,
            "A file lies in the folder that was not there when the manifest was written.",
            "Nothing to do.",
        ),
        # --- folders
        "empty-folder": e(
            FOLDER,
            "The folder is empty: a save that was killed before its first file.",
            "Use an older checkpoint.",
        ),
        "latest-dangling": e(
            FOLDER,
            "`latest` names a tag that is not there, or that holds no DeepSpeed files. DeepSpeed would stop with a "
            "bare assertion, or start anew.",
            "Choose an existing tag with --tag, or put its name into `latest`.",
        ),
        "pointer-stale": e(
            FOLDER,
            "`latest` names a tag although one with a higher number lies beside it. DeepSpeed follows `latest`, so a "
            "resume would go back to the older one. A save that was killed before it wrote `latest` leaves this.",
            "ckpt verify the newer one; if it is good, write its name into `latest`, else remove it.",
        ),
        "pointer-dangling": e(
            FOLDER,
            "`last_checkpoint` or `latest` names a checkpoint that is not there: it was deleted, or the run was moved "
            "in part. Frameworks fail on it, or start anew.",
            "ckpt latest --verified names the newest good one.",
        ),
        "none-verified": e(
            FOLDER,
            "No checkpoint of the run passes verify.",
            "ckpt verify each one, and mend the least damaged.",
        ),
        "no-checkpoints": e(USE, "The folder holds no checkpoints.", "Name the run's own folder."),
        "torch-needed": e(
            USE,
            "Only a call that gives torch tensors needs torch; reading, checking and writing do not.",
            "Install torch, or take the tensor as a numpy array.",
        ),
        "save-unfinished": e(
            FOLDER,
            "The Trainer writes into tmp-checkpoint-N and renames it when all is written, or marks the folder with "
            "checkpoint-is-incomplete.txt meanwhile. This save was interrupted, or still runs.",
            "Use an older checkpoint, or wait until the save is finished.",
        ),
        "latest-missing": e(
            FOLDER,
            "A DeepSpeed tag folder lies in an HF Trainer checkpoint, and the file `latest` that names it is gone. "
            "DeepSpeed would start anew.",
            "Put the tag's name into `latest`, if its save was finished.",
        ),
        "index-missing": e(
            FOLDER,
            "A sharded Hugging Face model without its index: nobody can tell whether shards are missing.",
            "Copy the *.index.json from where the folder was saved.",
        ),
        "config-mismatch": e(
            FOLDER,
            "config.json, adapter_config.json or the index says something else than the weights: another number of "
            "layers, another vocabulary, width, rank or total size. transformers fills missing layers with random "
            "weights and only warns.",
            "Copy the configuration and the weights from one save.",
        ),
        "shard-unused": e(
            FOLDER,
            "A file is named like a shard of the model, and the index does not name it: left over from a larger save.",
            "Move it away.",
        ),
        "model-missing": e(
            FOLDER,
            "mp_rank_00_model_states.pt is missing: the weights, the shapes of all parameters and the counters.",
            "Copy it from the node that ran rank 0.",
        ),
        "shard-missing": e(
            FOLDER,
            "A file that the others speak of is missing. On several nodes with local disks, each node keeps only "
            "its own ranks' files.",
            "Copy the missing files from the nodes that ran those ranks.",
        ),
        "shard-extra": e(
            FOLDER,
            "There are more optimizer files than ranks: left over from an earlier save with more ranks.",
            "Move the extra files out of the folder.",
        ),
        "shard-duplicate": e(
            FOLDER,
            "Two files hold the optimizer states of one rank, under different styles of name.",
            ONE_SAVE,
        ),
        "shard-mixed": e(
            FOLDER,
            "The optimizer files are named in several styles. DeepSpeed names them by the engine's dtype, so they "
            "come from several saves.",
            "Keep the files of one save in the folder.",
        ),
        "layout-unsupported": e(
            USE,
            "The checkpoint is recognised, but this layout is not read: ZeRO-3, pipeline, tensor or expert "
            "parallel, FAST writer, universal, torch distributed. It is refused rather than misread.",
            "Convert it with the framework that wrote it, or save with ZeRO stage 1 or 2.",
        ),
        # --- ranks against each other
        "rank-count": e(
            RANKS,
            "The optimizer files were saved with another number of ranks than the model file says.",
            ONE_SAVE,
        ),
        "group-count": e(RANKS, "The model file and the ranks have different numbers of groups.", ONE_SAVE),
        "partition-size": e(
            RANKS,
            "A rank's partition is not as long as the parameters' shapes make it. The file belongs to another "
            "model, another number of ranks or another rank.",
            ONE_SAVE,
        ),
        "rank-misplaced": e(
            RANKS,
            "Each rank's file names the parameter fragments it owns. This one names those of another rank: files "
            "were swapped, copied over or renamed. DeepSpeed resumes from such a folder without a word.",
            ONE_SAVE,
        ),
        "mapping-mismatch": e(
            RANKS,
            "The fragments that a rank says it owns do not follow from the parameters' shapes and order.",
            ONE_SAVE,
        ),
        "padding-mismatch": e(
            RANKS,
            "The padding that a rank states is not what the parameters' shapes make it. DeepSpeed's converters "
            "would cut the state at the wrong place.",
            ONE_SAVE,
        ),
        "moment-missing": e(RANKS, "The ranks hold different kinds of optimizer state.", ONE_SAVE),
        "moment-size": e(
            RANKS,
            "A moment is not as long as its partition. DeepSpeed would fail at the first step, not at load.",
            ONE_SAVE,
        ),
        "ranks-differ": e(
            RANKS,
            "Something that is replicated on all ranks (version, stage, learning rates, loss scaler) differs.",
            ONE_SAVE,
        ),
        "step-mismatch": e(
            RANKS,
            "The ranks' optimizers made different numbers of steps: the shards come from different saves. "
            "DeepSpeed resumes from such a folder without a word.",
            ONE_SAVE,
        ),
        "counter-mismatch": e(
            RANKS,
            "The optimizer's step count does not follow from the engine's counters. Either the optimizer was reset "
            "on purpose, or the model file is of another save. A full verify compares the weights and tells which.",
            "Run ckpt verify without --quick.",
        ),
        "tensor-missing": e(
            RANKS, "A parameter that the optimizer trains is not in the model file.", ONE_SAVE
        ),
        "shape-mismatch": e(RANKS, "A parameter has another shape in the model file.", ONE_SAVE),
        "tied-mismatch": e(RANKS, "Two tied names differ in shape or dtype.", ONE_SAVE),
        "master-mismatch": e(
            RANKS,
            "DeepSpeed keeps each trained weight twice: as fp32 master in the optimizer files, and rounded in the "
            "model file. Rounding the master must give the model's weight bit for bit. Here it does not: the files "
            "are of different saves, or one of them was changed. Code that edits the weights after the optimizer's "
            "step and before saving (such as swapping in an EMA copy) shows up here too.",
            ONE_SAVE,
        ),
        "buffer-missing": e(RANKS, "A buffer that the model file lists is not in it.", ONE_SAVE),
        "dtype-odd": e(
            RANKS,
            "A trained weight has another dtype than most, or is not floating point at all. Deliberate mixtures exist.",
            "Compare with the model's code; " + ONE_SAVE,
        ),
        "field-missing": e(
            RANKS,
            "A field that DeepSpeed always writes is not there: another program wrote the file.",
            ONE_SAVE,
        ),
        "field-contradicts": e(RANKS, "Two fields of the files contradict each other.", ONE_SAVE),
        "scheduler-mismatch": e(
            RANKS,
            "The scheduler's state does not fit the rest: its last_batch_iteration is not global_steps - "
            "skipped_steps - 1, or its learning rate is not the one in the optimizer files. DeepSpeed takes the "
            "optimizer's for the first step after a resume and the scheduler's from then on.",
            "Check which one was meant. A schedule that was restarted, stepped by hand or edited looks so.",
        ),
        "scheduler-missing": e(
            RANKS,
            "The file holds no scheduler state, while its own ds_config asks for a scheduler. DeepSpeed builds one and "
            "then fails with a TypeError when it loads None into it.",
            "Use an older checkpoint, or load this one with load_lr_scheduler_states=False.",
        ),
        "rate-unexpected": e(
            RANKS,
            "The saved schedule, replayed from its constants to its own count, gives another learning rate than the "
            "one in the optimizer. The first update after a resume is made with the optimizer's. It is an error where "
            "that rate is so high that one update destroys the weights.",
            "Use another copy. A rate that was set by hand looks so too.",
        ),
        "setting-implausible": e(
            RANKS,
            "A learning rate, beta or loss scale is no number, or out of the range in which an update can be computed. "
            "DeepSpeed takes them from the checkpoint, not from the new configuration.",
            "Use an older checkpoint.",
        ),
        # --- values
        "moments-zero": e(
            VALUES,
            "All of a rank's optimizer state is zero although updates were made. Loading gives no error, and the "
            "moments begin anew for the parameters of that rank.",
            "Use another copy of the rank's file. Parameters that never got a gradient look so too.",
        ),
        "masters-rounded": e(
            VALUES,
            "Every fp32 master weight of a rank is exactly a 16-bit number. Updates do not leave that: the master "
            "weights were lost and made again from the 16-bit weights.",
            "Use another copy of the rank's file.",
        ),
        "wild-value": e(
            VALUES,
            "A weight or moment holds finite values above 1e10. No network trains with such values: an exponent bit was "
            "flipped, or the run diverged.",
            "Look at the tensor; use an older checkpoint.",
        ),
        "moments-disagree": e(
            VALUES,
            "exp_avg_sq is 0 where exp_avg is not. One is a mean of gradients, the other of their squares: no gradients "
            "give that. A block of zeros lies in the file, as after a crash of the file system.",
            "Use another copy.",
        ),
        "copies-differ": e(
            VALUES,
            "Two copies of the same tensor within one file differ: tied weights that were saved apart, or the second "
            "copy that DeepSpeed keeps of frozen parameters.",
            "Use another copy of the file.",
        ),
        "negative-square": e(
            VALUES,
            "exp_avg_sq and its like are means of squares. Values below zero mean damage, or that two tensors were "
            "exchanged.",
            "Use another copy.",
        ),
        "nonfinite": e(
            VALUES,
            "A tensor holds NaN or Inf. In weights and optimizer state this is an error: training from here stays "
            "broken. Inf in a file whose weights and buffers cannot be told apart is a warning, since attention "
            "masks hold it; in buffers and in client state it is information.",
            "Use a checkpoint from before the divergence.",
        ),
        # --- safety and information
        "pickle-dangerous": e(
            VALUES,
            "Any loader that rebuilds the objects of this file, as Python's own does, would run what is named. No "
            "training framework writes such files. ckpt has not run it: it reads pickles as data.",
            "Do not load the file. Find out where it came from; get the weights from a trusted copy.",
        ),
        "class-unknown": e(
            INFO,
            "The file names a class that ckpt does not know. It is shown as data, never loaded, and written back "
            "as it was.",
            "Nothing to do.",
        ),
        "frozen-excluded": e(
            INFO,
            "Frozen parameters were left out when saving (exclude_frozen_parameters, as xtuner and LoRA runs do).",
            "Loading needs load_module_strict=False and the base model's weights.",
        ),
        "tensor-unknown": e(
            INFO,
            "The model file holds tensors that are neither parameters nor listed as buffers.",
            "Nothing.",
        ),
        "note": e(INFO, "Something worth knowing about the checkpoint.", "Nothing to do."),
        # --- could not run
        "not-found": e(USE, "There is no such file or folder.", "Check the path."),
        "no-permission": e(USE, "The file or folder may not be read.", "Ask its owner for permission."),
        "not-readable": e(
            USE, "The system refuses to open the file or list the folder.", "Check the path and disk."
        ),
        "read-error": e(
            FILE,
            "The disk or the network reported an error while the file was read.",
            "Check the disk; copy the file again from where it was saved.",
        ),
        "not-a-checkpoint": e(
            USE,
            "The path holds nothing that ckpt knows: .pt, .pth, .ckpt and .bin files of torch.save, safetensors, "
            "DeepSpeed ZeRO-1/2 folders, Hugging Face folders.",
            "Name the checkpoint itself.",
        ),
        "several-checkpoints": e(
            USE,
            "The folder holds several checkpoints and nothing says which one is meant.",
            "Name one of them.",
        ),
        "run-config": e(
            USE,
            "The file given with --config is neither a ds_config nor TrainingArguments (JSON), or it does not say "
            "how long the schedule is.",
            "Name the file that the new job is started with.",
        ),
        "model-config": e(
            USE,
            "A config.json alone names layers and sizes, not tensors; the names of this model's type are not known.",
            "Name a folder or file that holds the model's weights.",
        ),
        "tag-missing": e(USE, "There is no such tag in the folder.", "Use one of the tags that are listed."),
        "one-shard": e(
            USE,
            "The path is one rank's optimizer file. Each rank holds only its partition.",
            "Name the folder.",
        ),
        "no-optimizer-shards": e(
            USE,
            "The folder has a model file but no optimizer files: they were not copied, or ZeRO was off (stage 0).",
            "Extract the weights from the model file itself.",
        ),
        "shapes-missing": e(
            USE,
            "DeepSpeed before 0.4.4 did not save the parameters' shapes, or saved them in an order that is not "
            "that of the flat groups. Cutting the groups would be a guess.",
            "Load and save the checkpoint once with a newer DeepSpeed.",
        ),
        "too-many-files": e(
            USE, "The folder holds more entries than any checkpoint.", "Name the checkpoint."
        ),
        "bad-usage": e(USE, "The options do not make sense together.", "See ckpt COMMAND --help."),
        "system": e(
            USE,
            "The operating system refused something.",
            "Check permissions, space and that disks are mounted.",
        ),
        "internal": e(
            USE,
            "ckpttools met something it was not written for.",
            "Run again with --debug and report the traceback.",
        ),
        "not-zero": e(
            USE,
            "Only ZeRO-1 and ZeRO-2 folders are partitioned over ranks. Any number of ranks can load the others.",
            "Nothing to do: load it as it is.",
        ),
        "elastic": e(
            USE,
            "With elastic_checkpoint: true, DeepSpeed leaves lr, betas and weight_decay out of the files, and "
            "current versions cannot load their own elastic checkpoints. The weights can still be extracted.",
            "ckpt extract --weights-only, or save again without elastic_checkpoint.",
        ),
        "alignment-unknown": e(
            USE,
            "parameter_alignment is on and the model's dtypes are mixed: the gaps cannot be computed.",
            "Save without parameter_alignment.",
        ),
        "no-master": e(USE, "There are no fp32 master weights.", "Use --source model."),
        "nothing-selected": e(
            USE, "The patterns leave no tensor.", "ckpt inspect --tensors lists the names."
        ),
        "names-collide": e(
            USE, "After removing the prefix two names would be the same.", "Use another prefix."
        ),
        "no-config": e(
            USE, "The folder holds no configuration or tokenizer files.", "Give another --hf-config."
        ),
        "dtype-unsupported": e(
            USE, "The output format has no such element type.", "Use --format pt, or leave the tensor out."
        ),
        "cast": e(USE, "This conversion between element types does not exist.", "Leave out --dtype."),
        # --- another batch size
        "epoch-empty": e(
            USE,
            "With these numbers an epoch has no whole batch, and partial ones are dropped.",
            "Check --dataset-size, the batch and --drop-last.",
        ),
        "batch-unknown": e(
            USE,
            "The checkpoint does not say how many samples an iteration stood for.",
            "Give --old-bs, and --old-gpus and --old-accum where they were not 1.",
        ),
        "batch-differs": e(
            USE,
            "The old batch size that was given is neither the batch per GPU nor the whole batch that the "
            "checkpoint states. Every position in the data would be wrong.",
            "Give the size that it was trained with, or say with --batch-is which one is meant.",
        ),
        "batch-indivisible": e(
            USE,
            "A global batch must divide by ranks x accumulation: every rank computes the same number of samples.",
            "Choose another accumulation or number of GPUs: ckpt batch lists the ways.",
        ),
        "dataset-ambiguous": e(
            USE,
            "From the old iterations per epoch follows only between which numbers the dataset's size lies, and "
            "the new epochs would not all have the same length.",
            "Give the number of training samples with --dataset-size.",
        ),
        "dataset-differs": e(
            USE,
            "With the dataset size, batch and ranks given, an epoch would not have the iterations that the "
            "checkpoint counted.",
            "Check --dataset-size, --old-bs, --old-gpus, --old-accum, --drop-last.",
        ),
        "schedule-damaged": e(
            USE,
            "A value that the learning-rate schedule needs is missing from its saved state, or cannot be (a "
            "negative length, not a number). The rates of the coming steps cannot be computed.",
            "Use an older checkpoint, or build the scheduler anew in the training script.",
        ),
        "schedule-unknown": e(
            USE,
            "The schedule is of a kind that cannot be computed: a framework that is not known, schedulers that "
            "the framework itself cannot step, or so many steps that they cannot be replayed one by one.",
            "Set the scheduler up anew in the training script, for the new batch size.",
        ),
        "schedule-unit": e(
            USE,
            "Training code may step a scheduler once per epoch, update or micro-batch, and saves no word of it. "
            "Here the counters do not tell either.",
            "Say it with --schedule-unit.",
        ),
        "no-schedule": e(
            USE,
            "No scheduler is saved: the learning rate was constant, or came from code that saved nothing.",
            "If it is constant or follows from the counters, --counters-only moves these alone.",
        ),
        "no-optimizer": e(
            USE,
            "A scheduler's state is saved, but not the optimizer's settings that it acts on.",
            "Name the whole checkpoint; --counters-only moves the counters alone.",
        ),
        "run-finished": e(
            USE,
            "The counter stands at the end of the run: there is no schedule left to go on with.",
            "To train longer, start a new schedule from the weights.",
        ),
        "rebased-already": e(
            USE,
            "The checkpoint carries the note of an earlier rebase and was not trained since. Doing it twice "
            "would move everything once more.",
            "Start from the original; --force if another change on top of it is meant.",
        ),
        "lr-scaling": e(
            USE,
            "The rule asked for cannot be applied to this optimizer, or only to a smaller change of the batch.",
            "Choose another rule for --lr-scaling.",
        ),
        "plot-needs": e(
            USE, "Plots are drawn with matplotlib, which is not installed.", "pip install 'ckpttools[plot]'"
        ),
        "weights-only": e(
            USE,
            "There are only weights: no counter, schedule or optimizer that a batch size could change.",
            "Name the training checkpoint itself.",
        ),
        "counter-wild": e(VALUES, "A counter holds a number that no run reaches, or a negative one.", AGAIN),
        "ranks-disagree": e(
            RANKS,
            "The ranks' files hold different optimizer settings, such as the learning rate. Each rank resumes "
            "with its own, and the parts of the model would drift apart.",
            ONE_SAVE,
        ),
        # --- writing
        "destination-exists": e(
            WRITE, "DST exists. Nothing is overwritten unasked.", "Use --force or another DST."
        ),
        "destination-in-source": e(
            WRITE,
            "DST is, holds or lies within the source, which is never written to.",
            "Choose another DST.",
        ),
        "destination-parent": e(WRITE, "The folder that DST is to appear in does not exist.", "Create it."),
        "no-space": e(
            WRITE,
            "The file system has too little room, or ran full while writing. Nothing was left behind.",
            "Free the space that is named, or choose a DST elsewhere.",
        ),
        "file-too-big": e(
            WRITE,
            "The system refuses files of this size (ulimit -f, or the file system).",
            "Raise the limit.",
        ),
        "write-failed": e(
            WRITE,
            "The system could not write, flush or rename. Nothing was left behind; a failed flush is never retried, "
            "since the data may be gone from memory.",
            "Check the disk, then run it again.",
        ),
        "source-truncated": e(WRITE, "A source file ended before its tensors did.", AGAIN),
        "source-changed": e(
            WRITE,
            "A source file changed while it was read: a save is going on. The result was thrown away.",
            "Wait until the save is finished and run it again.",
        ),
        "source-unreadable": e(WRITE, "The system could not read a source file.", "Check the disk."),
        "written-wrong": e(
            WRITE,
            "What was written does not pass the header checks. This is a defect of ckpttools.",
            "Do not use the result; the source is unchanged. Please report it.",
        ),
        # --- training
        "train-config": e(TRAIN, "The trainer's configuration is wrong at the place named.", "Correct it."),
        "train-batch": e(
            TRAIN,
            "The batch settings do not fit: global = micro x accumulation x ranks.",
            "Change one of the numbers as the message says.",
        ),
        "train-data": e(
            TRAIN, "The text to train on is missing, empty or too short.", "Give another source."
        ),
        "train-requires": e(
            TRAIN, "A package that training needs is not installed.", "Install ckpttools[train]."
        ),
        "train-crash": e(TRAIN, "A training process ended unexpectedly.", "Read the log that is named."),
        "run-exists": e(
            TRAIN,
            "The run folder holds checkpoints already.",
            "Resume with --resume, or name another folder.",
        ),
        "world-size": e(
            TRAIN,
            "The checkpoint was saved with another number of ranks, and DeepSpeed refuses to load it.",
            "ckpt reshard CHECKPOINT --world-size N.",
        ),
        "precision": e(
            TRAIN,
            "The checkpoint was saved in another precision; DeepSpeed looks for differently named files.",
            "Train in the precision of the checkpoint.",
        ),
        "no-optimizer-states": e(
            TRAIN, "The checkpoint has no optimizer states to resume from.", "Load its weights only."
        ),
        "no-position": e(
            TRAIN,
            "The checkpoint does not say where in the data it was saved: another program wrote it.",
            "Load its weights only: --resume-from without --resume.",
        ),
        "data-changed": e(
            TRAIN,
            "The text is not the one that the checkpoint was trained on, so the next sample is not defined.",
            "Give the same text, or load the weights only.",
        ),
        "resume-failed": e(TRAIN, "DeepSpeed could not load the checkpoint.", "Run ckpt verify on it."),
        "demo-failed": e(TRAIN, "A step of the demo failed, or its losses differ.", "Read the output above."),
    }


EXPLANATIONS = _all()
