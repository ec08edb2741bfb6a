"""The console commands: what their help says, and the functions that check a configuration and do the work.

Those functions are named as `module:function` and imported when they are needed: `--help` loads none of them.
"""

from __future__ import annotations

from typing import Any, Final

from m2_encoder.config.command import Command
from m2_encoder.config.paths import default_run_folder


def _command(name: str, *, module: str = "", **texts: Any) -> Command:
    """`m2-data pack` reads `conf/commands/data_pack.yaml`; `cli/data_pack.py` has its `check_pack` and `run_pack`."""
    words = name.removeprefix("m2-").split()
    place = f"m2_encoder.cli.{module or '_'.join(words)}"
    return Command(
        name=name,
        config_name="_".join(words),
        config_folder="commands",
        check=f"{place}:check_{words[-1]}",
        run=f"{place}:run_{words[-1]}",
        **texts,
    )


TRAIN: Final = Command(
    name="m2-train",
    config_name="train",
    summary="Train, evaluate and export an image-text encoder; one folder in outputs/ per run.",
    examples=(
        "m2-train +experiment=emoji",
        "m2-train +experiment=emoji run.name=wide model.embed_dim=256 optimizer.lr=5e-4",
        "m2-train +experiment=emoji run.name=two strategy=ddp trainer.devices=2",
        "m2-train data=webdataset data.sources.main.shards='/data/{000..099}.tar' model.tokenizer=sp.model",
        "m2-train ... strategy=grouped_ddp strategy.group_size=8   # negatives from 8 ranks instead of from all",
        "m2-train -m +experiment=smoke optimizer.lr=1e-3,2e-3      # smoke-lr=0.001, smoke-lr=0.002",
        "m2-train --config-path outputs/emoji --config-name config  # repeats a run",
    ),
    check="m2_encoder.config.validate:validate_train",
    check_late="m2_encoder.config.validate:check_late",
    check_job="m2_encoder.cli.train:check_job",
    run="m2_encoder.cli.train:run_train",
    run_folder=default_run_folder,
    complete="m2_encoder.cli.train:name_repetition",
    is_done="m2_encoder.cli.train:is_done",
    module="m2_encoder.cli.train",
    end_sweep="m2_encoder.cli.sweep:report_sweep",
    measure="m2_encoder.cli.train:measure_run",
    notes=(
        "A run's folder must not exist; run.resume=auto continues one, run.resume=must insists on a checkpoint.",
        "One process at a time trains in a run's folder: a second start is refused while the first lives.",
        "Exit codes: 0 done, 2 something to mend (listed on stderr before anything starts), 130 ended by Ctrl-C, 143",
        "by SIGTERM; both save the step they come in, and a second Ctrl-C ends at once.",
    ),
)

EVALUATE: Final = _command(
    "m2-evaluate",
    groups=("evaluation",),
    summary="Measure how well a model retrieves images and texts in both languages.",
    examples=(
        "m2-evaluate model=outputs/emoji/export data=emoji",
        "m2-evaluate model=outputs/emoji/export data=my_tars output=results.json",
        "m2-evaluate model=outputs/emoji/export 'evaluation=[emoji,tuxpaint]' page=report.html  # suites, as a page",
        "m2-evaluate model=outputs/r2d2/export rerank=16   # order the best 16 anew by the matching head",
        "m2-evaluate model=outputs/emoji/export --config-dir my_conf 'evaluation=[retrieval,mine]'  # your own task",
    ),
    notes=(
        "Recall at k in percent, ranks as pessimistic as can be: equal scores count against the right item. The chance",
        "row is what a random order would reach. Each caption is a query once; images with its key are all right.",
        "rerank=K: the first K of each query are ordered anew by the matching head that the model's folder holds; the",
        "others stay behind them. Both results are shown. It costs K passes of the vision-language layers per query.",
    ),
)

EXPORT: Final = _command(
    "m2-export",
    groups=("to",),
    summary="Write a model as a folder for m2_encoder.load and for other tools, and prove that they give its features.",
    examples=(
        "m2-export run.name=emoji",
        "m2-export run.name=emoji checkpoint=step=500.ckpt output=outputs/emoji/export-500",
        "m2-export run.name=emoji 'to=[native,onnx]' output=outputs/emoji/onnx",
        "m2-export model=outputs/emoji/export 'to=[onnx]' to.onnx.dtype=float16 output=half",
        "m2-export model=m2-encoder-0.4b weights=m2_encoder_0.4B.ckpt tokenizer=sp.model 'to=[onnx]' output=graphs",
    ),
    notes=(
        "checkpoint: `last`, the name of a file in the run's checkpoints/, or the path of a copy of one.",
        "Every format is tried on 64 texts and 32 pictures; one whose features are not those of load is not written.",
        "",
        "Exit codes: 0 all formats written, 1 some of them, 2 none: the message says why.",
    ),
)

EMBED: Final = _command(
    "m2-embed",
    summary="Write features of a folder of images, or of a text file.",
    examples=(
        "m2-embed model=outputs/emoji/export images=photos output=photos.safetensors",
        "m2-embed model=outputs/emoji/export texts=captions.txt output=captions.parquet",
        "m2-embed model=m2-encoder-0.4b weights=m2_encoder_0.4B.ckpt tokenizer=sp.model images=photos "
        "output=photos.parquet",
    ),
    notes=(
        "Images are found in all sub-folders, by suffix, in sorted order; a text file is UTF-8, one text per line.",
        "What cannot be used (a damaged image, a blank line) is listed on stderr and skipped; the column `index` says",
        "which place in the input a row has. m2_encoder.evaluation.feature_file.read_features reads both formats.",
        "",
        "Exit codes: 0 everything embedded, 1 something was skipped, 2 nothing written: the message says what to mend.",
    ),
)

PLAN: Final = _command(
    "m2-plan",
    groups=("adaptation",),
    summary="Predict memory, traffic and time of a training step, and find the best contrastive groups.",
    examples=(
        "m2-plan model=m2_encoder_1b cluster=a100_80g ranks=256",
        "m2-plan ranks=64 global_batch_size=65536 group_batch_size=32768 output=plan.json plot=plan.png",
        "m2-plan group_size=32 micro_batches=4 cluster=h100_80g hardware.inter_node_gb_per_s=50",
        "m2-plan model=m2_encoder_0_4b ranks=1 global_batch_size=256 group_batch_size=256 adaptation=lora",
    ),
    notes=(
        "Nothing is trained and no device is needed. A rank contrasts its k micro-batches of B rows with those of the",
        "g ranks of its group; the baselines contrast the rows of all ranks, and may accumulate micro-batches with a",
        "loss of their own. Constants, and where they come from, are in conf/cluster/hardware. The plan ends with",
        "what it leaves out.",
    ),
)

SERVE: Final = _command(
    "m2-serve",
    summary="Serve a search page, and answer immich, MT-Photos and other programs that ask for features.",
    examples=(
        "m2-serve index=photos.index",
        "m2-serve index=drawings model=outputs/emoji/export open=true  # the built-in drawings, in a browser",
        "m2-serve index=photos.index host=0.0.0.0 port=3003            # others can see the pictures",
        "m2-serve model=outputs/emoji/export host=0.0.0.0 api_key=KEY  # immich and MT-Photos alone",
    ),
    notes=(
        "The address that is printed shows the page to browsers; /api lists what programs can ask. Only files that the",
        "index names and that lie below its folder are served. Nothing is asked of other machines.",
        "docs/serving.md says what to set in immich and MT-Photos.",
    ),
)

DATA_EMOJI: Final = _command(
    "m2-data emoji",
    summary="Unpack the built-in bilingual emoji set to WebDataset tars, one folder per split.",
    examples=("m2-data emoji", "m2-data emoji folder=emoji-tars"),
    module="data",
)

DATA_PACK: Final = _command(
    "m2-data pack",
    summary="Pack images with captions, from a folder or tables, into WebDataset tars.",
    examples=(
        "m2-data pack source=photos output=tars",
        "m2-data pack source=MUGE/train_imgs.tsv output=tars/muge language=zh",
        "m2-data pack source='laion/*.parquet' output=tars/laion columns.image=URL columns.caption=TEXT max_side=512",
    ),
    notes=(
        "A run that was stopped, however it ended, goes on when it is started again; the tars are the same, byte for",
        "byte, whatever the number of workers. Started again after images or captions were written again, it packs",
        "their tars again. What cannot be packed is counted by reason and listed.",
        "",
        "Exit codes: 0 done, 1 done but too many failures (max_failed_share), 2 nothing packed: the message says why.",
    ),
)

DATA_CHECK: Final = _command(
    "m2-data check",
    summary="Look into shards before training: usable samples, captions, images, duplicates, false negatives.",
    examples=(
        "m2-data check source=emoji-tars/train",
        "m2-data check source='tars/{000..099}.tar' batch_size=32768 full=true json=true",
        "m2-data check source='s3://bucket/{000..099}.tar' cache=outputs/cache max_shards=2",
    ),
    notes=(
        "A few samples of a few shards are read, unless full=true; counts of the whole source are then estimates, and",
        "rare faults may be missed. Duplicates are exact: the same bytes of an image, the same text of a caption.",
        "",
        "Exit codes: 0 fine, 2 training on it would be pointless or refused: the last lines say why, and the way out.",
    ),
)

DATA_STATS: Final = _command(
    "m2-data stats",
    summary="Tables and a picture of shards: languages, lengths in words and tokens, sizes, duplicates.",
    examples=(
        "m2-data stats source=emoji-tars/train plot=emoji.png",
        "m2-data stats source='tars/*.tar' tokenizer=sp.model full=true output=stats.json plot=stats.pdf",
    ),
    notes=(
        "Words of Chinese captions are those of jieba; pictures need the extra plot.",
        "A part of the source is read, unless full=true.",
    ),
)

DATA_SPLIT: Final = _command(
    "m2-data split",
    summary="Split WebDataset tars into train and val without a picture, caption or identity on both sides.",
    examples=(
        "m2-data split tars output=sides val=0.1",
        "m2-data split tars output=sides val=0.2 by=folder names.val=heldout",
        "m2-data split 'tars/*.tar' output=sides by=hash max_repeats=20",
    ),
    notes=(
        "Samples are copied with all of their files, byte for byte; each tar gives one on each side. What is connected",
        "by the same or a similar picture, an equal caption, an identity or a key stays together. by=hash decides for",
        "each group by itself: the share is met on average only, and more data leave other groups where they are.",
        "A run that was stopped goes on when it is started again; the tars are the same for any number of workers.",
    ),
)

DATA_TOKENIZER: Final = _command(
    "m2-data tokenizer",
    summary="Train a SentencePiece tokenizer on captions, and say how long they become and how many are cut.",
    examples=(
        "m2-data tokenizer tars output=tokenizer.model vocab_size=8000",
        "m2-data tokenizer captions.txt output=tokenizer.model vocab_size=3500 context_length=32",
        "m2-train data=webdataset model.tokenizer=tokenizer.model model.vocab_size=8000 ...  # uses it",
    ),
    notes=(
        "The same captions and options give the same bytes. Characters without a piece become bytes: none is unknown.",
        "Weights that were trained with another tokenizer refuse it; model.map_tokenizer=true maps their pieces.",
    ),
)

DATA_CURATE: Final = _command(
    "m2-data curate",
    summary="Drop what is not worth training on from WebDataset tars, and say what fell where and why.",
    examples=(
        "m2-data curate shards=tars output=curated",
        "m2-data curate 'shards={laion: tars/laion, wukong: tars/wukong}' 'language={wukong: zh}' output=curated",
        "m2-data curate shards=tars output=curated score.model=outputs/emoji/export evaluation.images=[flickr30k_test]",
        "m2-data curate shards=emoji-tars/train output=emoji-curated images.min_side=32",
    ),
    notes=(
        "decisions/ keeps every pair with all values, keep and reason, as Arrow files; report.json and report.md count",
        "them by source, language and reason. A run that was stopped, however it ended, goes on when it is started",
        "again; the result is the same, byte for byte, for any number of workers, and on Ray. New shards hold the",
        "image and one .json per sample; other members of a sample are not carried over.",
    ),
)

SEARCH_INDEX: Final = _command(
    "m2-search index",
    summary="Make an index of a folder of pictures, or bring one up to date.",
    examples=(
        "m2-search index photos model=outputs/emoji/export",
        "m2-search index photos  # again: what is new, changed or gone since then",
        "m2-search index photos output=p.index model=m2-encoder-0.4b weights=m2_encoder_0.4B.ckpt tokenizer=sp.model",
    ),
    notes=(
        "A picture is known by path, size and time of its file; only what is new or changed is encoded. A run that was",
        "stopped, however it ended, goes on when it is started again. Pictures are only read. What cannot be used is",
        "listed on stderr, and tried again the next time.",
        "",
        "Exit codes: 0 all pictures are in it, 1 some were skipped, 2 the index is as it was: the message says why.",
    ),
)

_QUERY_NOTES: Final = (
    "The line in the list is where it probably ends: pictures behind it are hardly nearer to the query than the rest",
    "of the folder is. tail=false leaves them out. The model is the one that made the index.",
)

SEARCH_QUERY: Final = _command(
    "m2-search query",
    module="search_query",
    summary="Find pictures by words in Chinese or English, by a picture, or by a sum of both.",
    examples=(
        'm2-search query photos.index "红色的水果"',
        'm2-search query photos.index \'2*"狗" + pool.jpg - "水果"\' sheet=dogs.png',
        'm2-search query photos.index "a dog in the snow" tail=false format=paths',
    ),
    notes=(
        "In a sum words stand in quotes and pictures do not; a picture is a file, or a name as the index has it.",
        "What is no sum is words as they are.",
        *_QUERY_NOTES,
    ),
)

SEARCH_SIMILAR: Final = _command(
    "m2-search similar",
    module="search_query",
    summary="Find the pictures that are most like one.",
    examples=(
        "m2-search similar photos.index beach/pool.jpg",
        "m2-search similar photos.index ~/elsewhere/dog.png sheet=like.png",
    ),
    notes=_QUERY_NOTES,
)

SEARCH_DUPLICATES: Final = _command(
    "m2-search duplicates",
    summary="List groups of near-equal pictures: copies, other sizes and formats, series of shots.",
    examples=("m2-search duplicates photos.index", "m2-search duplicates photos.index threshold=0.95 sheet=twins.png"),
    notes=(
        "Features are compared, not bytes: what a model takes for the same is the same. Nothing is removed. Each",
        "group begins with its largest file; format=paths gives the others, one a line.",
    ),
)
