"""What model cards say, in Chinese and English: numbers and names stand once, words beside each other."""

from __future__ import annotations

from typing import Final, NamedTuple

from m2_encoder.pictures import PicturePolicy


class Words(NamedTuple):
    """The same in both languages."""

    en: str
    zh: str

    @property
    def line(self) -> str:
        """Both on one line."""
        return f"{self.zh} / {self.en}"

    @property
    def paragraphs(self) -> str:
        """One below the other."""
        return f"{self.zh}\n\n{self.en}"


def heading(text: str, level: int = 2) -> str:
    """A heading in both languages, or as it is if the project has no Chinese for it."""
    return f"{'#' * level} {label(text)}"


def label(text: str) -> str:
    """A few words that head something: `steps · 步数`."""
    return f"{text} · {chinese}" if (chinese := CHINESE.get(text)) else text


def line(text: str) -> str:
    """A text and its Chinese on one line, or alone if it is a user's own."""
    return Words(text, chinese).line if (chinese := CHINESE.get(text)) else text


def paragraphs(text: str) -> str:
    """A text below its Chinese, or alone if it is a user's own."""
    return Words(text, chinese).paragraphs if (chinese := CHINESE.get(text)) else text


SUMMARY: Final = "A bilingual (Chinese and English) image-text encoder."
_TRAINED = "A bilingual Chinese and English image-text encoder of the M2-Encoder architecture, trained from"
FROM_SCRATCH: Final = f"{_TRAINED} scratch with m2-train."
FROM_WEIGHTS: Final = f"{_TRAINED} given weights with m2-train."
MIXED: Final = "The weighted mean of the weights of several models (arXiv:2109.01903, arXiv:2203.05482)."
EMOJI_LIMITS: Final = (
    "Trained on drawings of emoji alone: it knows nothing of photographs.",
    "Captions are names and keywords, not sentences.",
    "Held-out style and families are for reporting; no training setting was chosen by them.",
)
HOW_TO_READ: Final = (
    "Percent. t2i: pictures for a text, i2t: texts for a picture; r@k: queries with a right result among the first k; "
    "mean_recall: the mean of the six; chance: guessing."
)
OF_ITS_WEIGHTS: Final = "that of the weights it was made from"

CHINESE: Final = {
    # headings
    "Use": "用法",
    "Architecture": "结构",
    "Data": "数据",
    "Training": "训练",
    "Results": "结果",
    "Limits": "局限",
    "Origin": "来源",
    "Licence": "许可",
    "Files": "文件",
    "Formats": "各工具的格式",
    "heldout_style": "没见过的画风",
    "heldout_families": "没见过的概念和画风",
    "val": "没见过的概念",
    "val_style": "没见过的概念和画风",
    # labels
    "family": "系列",
    "parameters": "参数",
    "image": "图片",
    "pictures": "图片的读法",
    "text": "文本",
    "layers": "层",
    "features": "特征",
    "objectives": "目标",
    "steps": "步数",
    "samples per step": "每步样本",
    "learning rate": "学习率",
    "precision": "精度",
    "seed": "随机种子",
    "matching head": "匹配头",
    "run": "训练名",
    "mixed": "混合",
    "model": "模型",
    "weights": "权重",
    "weights_sha256": "权重的校验和",
    "git_revision": "代码版本",
    "command": "命令",
    "versions": "软件版本",
    # tables
    "source": "来源",
    "licence": "许可",
    "contributes": "提供",
    "chance": "随机",
    "file": "文件",
    "bytes": "字节",
    "format": "格式",
    "largest difference": "最大差",
    "smallest cosine": "最小余弦",
    "ms a picture": "毫秒/图",
    "ms a text": "毫秒/文本",
    "peak MB": "内存峰值 MB",
    "mean": "平均",
    "drawings": "图画",
    "names and keywords in Chinese and English": "中英文名称和关键词",
    "aliases": "别名",
    # sentences
    SUMMARY: "中英双语图文编码器。",
    FROM_SCRATCH: "M2-Encoder 结构的中英双语图文编码器，用 m2-train 从头训练。",
    FROM_WEIGHTS: "M2-Encoder 结构的中英双语图文编码器，用 m2-train 从给定的权重继续训练。",
    MIXED: "几个模型权重的加权平均（arXiv:2109.01903，arXiv:2203.05482）。",
    EMOJI_LIMITS[0]: "只用 emoji 图画训练，对照片一无所知。",
    EMOJI_LIMITS[1]: "训练文本是名称和关键词，不是句子。",
    EMOJI_LIMITS[2]: "没见过的画风和概念只用于报告，没有据此选择任何训练设置。",
    OF_ITS_WEIGHTS: "与原权重相同",
    HOW_TO_READ: "百分比。t2i 为以文搜图，i2t 为以图搜文；r@k：前 k 个结果中有正确结果的查询所占比例；"
    "mean_recall：六者的平均；chance：随机猜测。",
}
"""Chinese of all that the project itself says; other texts are of users and stay as they are."""

_POLICY: Final = {
    "obeyed": "遵从 EXIF 方向",
    "ignored": "忽略 EXIF 方向",
    "scaled": "16 位缩放为 8 位",
    "clipped": "16 位截断为 8 位",
    "dropped": "丢弃透明通道",
    "white": "透明处为白色",
    "grey": "透明处为灰色",
    "black": "透明处为黑色",
}


def describe_pictures(policy: PicturePolicy) -> Words:
    """How pictures become pixels."""
    return Words(
        str(policy), "，".join(_POLICY[each] for each in (policy.orientation, policy.background, policy.depth))
    )
