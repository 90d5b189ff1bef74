"""The tasks of the package: name -> fields of `eval.tasks.Task`.

Prompts are those of lmms-eval (lmms_eval/tasks/NAME) unless noted otherwise; "vlmevalkit" are those of VLMEvalKit
(vlmeval/dataset). With the preset "bench" the model thinks and answers as in the published benchmarks; but these showed
48,000 tokens of a video (arXiv 2507.01006, 6.1), and the checkpoint's processor shows 30,000.
"""

from collections.abc import Mapping
from typing import Any

_SHORT = "{{ question }}\nAnswer the question using a single word or phrase."
_OPTIONS = "{% for letter, text in options.items() %}\n{{ letter }}. {{ text }}{% endfor %}"
_LETTER = "Answer with the option's letter from the given choices directly."
_LETTER_ONLY = "Respond with only the letter (A, B, C, or D) of the correct option."

_PINPOINT = (
    "Please pinpoint the bounding box [[x1,y1,x2,y2], …] in the image as per the given description. {{ question }}"
)
_UNIT_BOX = (
    "Bounding box coordinates are specified in the format (top-left x, top-left y, bottom-right x, bottom-right y). "
    "All values are floating point numbers bounded between 0 and 1"
)

_MATHVISTA_FORMAT = (
    "{{ question }}{% if unit %} (Unit: {{ unit }}){% endif %}"
    + _OPTIONS
    + "\n{% if options %}"
    + _LETTER
    + "{% elif answer_type == 'integer' %}Answer the question using a single integer number."
    "{% elif answer_type == 'float' %}Answer the question using a single floating-point number with "
    "{{ 'one decimal place' if precision == 1 else 'two decimal places' }}."
    "{% else %}Answer the question using a Python list.{% endif %}"
)

_DIGITS: Mapping[str, Any] = {
    "preset": "greedy",
    "data": "none, as its data comes with the package",
    "source": "held-out digits of scikit-learn's load_digits, glm4v_jax/tiny/digits.py",
}

_OCR: Mapping[str, Any] = {
    "reader": "images",
    "preset": "ocr",
    "data": "files of rows as eval/data/rows.py describes them, with an image and its answer; no question is needed",
    "source": "prompts: zai-org/GLM-OCR, glmocr/config.yaml",
}

ENTRIES: Mapping[str, Mapping[str, Any]] = {
    "digits-vqa": {
        **_DIGITS,
        "description": "which handwritten digit an image shows (in the package)",
        "reader": "digits-vqa",
        "metric": "exact_match",
        "variants": {"ocr": {"metric": "edit_distance"}},
    },
    "digits-grounding": {
        **_DIGITS,
        "description": "where a digit is, alone or beside another (in the package)",
        "reader": "digits-grounding",
        "metric": "box_iou",
    },
    "digits-motion": {
        **_DIGITS,
        "description": "which way a digit moves in a video (in the package)",
        "reader": "digits-motion",
        "metric": "exact_match",
    },
    "vqa": {
        "description": "your own questions with answers, equal but for case and whitespace",
        "metric": "exact_match",
        "prompt": _SHORT,
        "preset": "bench",
    },
    "multiple-choice": {
        "description": "your own questions with options",
        "metric": "mcq",
        "prompt": "{{ question }}" + _OPTIONS + "\n" + _LETTER,
        "preset": "bench",
    },
    "grounding": {
        "description": "your own phrases with the boxes of all objects that they mean",
        "metric": "multi_box",
        "prompt": _PINPOINT,
        "preset": "bench",
        "source": "prompt: arXiv 2507.01006",
    },
    "ocr-text": {
        **_OCR,
        "description": "your own images of text, asked as GLM-OCR is: normalised edit distance",
        "metric": "edit_distance",
        "prompt": "Text Recognition:",
        "variants": {
            "omnidocbench": {"metric": "edit_distance-omnidocbench"},
            "cer": {"metric": "cer"},
            "wer": {"metric": "wer"},
        },
    },
    "ocr-table": {
        **_OCR,
        "description": "your own images of tables with their HTML, asked as GLM-OCR is: TEDS",
        "metric": "teds",
        "prompt": "Table Recognition:",
        "variants": {"omnidocbench": {"metric": "teds-omnidocbench"}},
    },
    "ocr-formula": {
        **_OCR,
        "description": "your own images of formulas with their LaTeX, asked as GLM-OCR is: edit distance",
        "metric": "formula_edit_distance",
        "prompt": "Formula Recognition:",
    },
    **{
        f"omnidocbench-{kind}": {
            **_OCR,
            "description": f"OmniDocBench: {what} cut out of pages, {score}",
            "reader": f"omnidocbench-{kind}",
            "metric": metric,
            "prompt": f"{kind.capitalize()} Recognition:",
            "data": "OmniDocBench.json of https://huggingface.co/datasets/opendatalab/OmniDocBench beside its images/",
            "source": "arXiv 2412.07626, evaluation of single modules; prompts: zai-org/GLM-OCR, glmocr/config.yaml",
        }
        for kind, what, metric, score in (
            ("text", "blocks of text", "edit_distance-omnidocbench", "normalised edit distance"),
            ("table", "tables", "teds-omnidocbench", "TEDS"),
            ("formula", "display formulas", "formula_edit_distance", "edit distance (not CDM)"),
        )
    },
    "refcoco": {
        "description": "RefCOCO, RefCOCO+, RefCOCOg: the box of the object that an expression means",
        "reader": "refcoco",
        "metric": "refcoco",
        "prompt": _PINPOINT,
        "variants": {
            "locate": {"prompt": "Help me to locate {{ question }} in the image and give me its bounding boxes."},
            "lmms-eval": {
                "prompt": f"{_UNIT_BOX}. Please provide the bounding box coordinate of the region this sentence "
                "describes: {{ question }}",
                "metric": "refcoco-lmms",
            },
            "vlmevalkit": {"metric": "refcoco-vlmevalkit"},
        },
        "preset": "bench",
        "data": "Parquet files of https://huggingface.co/datasets/lmms-lab/RefCOCO (RefCOCOplus, RefCOCOg)",
        "source": "arXiv 1608.00272; prompts: arXiv 2507.01006, lmms-eval refcoco/utils_rec.py",
    },
    "screenspot": {
        "description": "ScreenSpot, ScreenSpot-v2: clicking on what an instruction means",
        "reader": "screenspot",
        "metric": "screenspot",
        # lmms-eval's request, for boxes as this model writes them.
        "prompt": "Please provide the bounding box [[x1,y1,x2,y2]] of the region that corresponds to the command: "
        "{{ question }}",
        "variants": {
            "lmms-eval": {
                "prompt": f"{_UNIT_BOX} with two decimal places of precision (e.g., 0.15). Please provide the bounding "
                "box coordinates of the region that corresponds to the command: {{ question }}",
                "metric": "screenspot-lmms",
            },
            "vlmevalkit": {
                "system": "You are a GUI agent. You are given a task and a screenshot of the screen. You need to "
                "perform pyautogui click/moveTo action to complete the task. The answer format is "
                "`pyautogui.click(x=?, y=?), x and y is necessary`",
                "prompt": "Please complete the following tasks by clicking using `pyautogui.click`:\n{{ question }}",
                "metric": "screenspot-vlmevalkit",
            },
        },
        "preset": "bench",
        "data": "screenspot_*.json of https://github.com/njucckevin/SeeClick with its images, or Parquet files of "
        "https://huggingface.co/datasets/rootsautomation/ScreenSpot",
        "source": "arXiv 2401.10935; lmms-eval screenspot/utils_rec.py, VLMEvalKit GUI/screenspot.py",
    },
    "chartqa": {
        "description": "ChartQA: questions about charts, relaxed accuracy",
        "reader": "chartqa",
        "metric": "relaxed_accuracy",
        "prompt": "{{ question }}\nAnswer the question with a single word.",
        "variants": {"vlmevalkit": {"prompt": _SHORT}},
        "preset": "bench",
        "data": "test_human.json and test_augmented.json beside png/, or Parquet files of "
        "https://huggingface.co/datasets/lmms-lab/ChartQA",
        "source": "arXiv 2203.10244; lmms-eval chartqa.yaml, VLMEvalKit image_vqa.py",
    },
    "docvqa": {
        "description": "DocVQA: questions about documents, ANLS",
        "reader": "docvqa",
        "metric": "anls",
        "prompt": _SHORT,
        "variants": {"harness": {"metric": "anls-harness"}},
        "preset": "bench",
        "data": "val_v1.0_withQT.json of https://rrc.cvc.uab.es/?ch=17 with its images, or Parquet files of "
        "https://huggingface.co/datasets/lmms-lab/DocVQA",
        "source": "arXiv 2007.00398; lmms-eval docvqa, VLMEvalKit image_vqa.py",
    },
    "infovqa": {
        "description": "InfographicVQA: questions about infographics, ANLS",
        "reader": "docvqa",
        "metric": "anls",
        "prompt": _SHORT,
        "variants": {"harness": {"metric": "anls-harness"}},
        "preset": "bench",
        "data": "infographicsVQA_val_v1.0_withQT.json of https://rrc.cvc.uab.es/?ch=17 with its images, or Parquet "
        "files of https://huggingface.co/datasets/lmms-lab/DocVQA (InfographicVQA)",
        "source": "arXiv 2104.12756; lmms-eval infovqa, VLMEvalKit image_vqa.py",
    },
    "textvqa": {
        "description": "TextVQA: questions about text in photographs, VQA accuracy",
        "reader": "textvqa",
        "metric": "vqa_accuracy",
        "prompt": _SHORT,
        "variants": {
            "lmms-eval": {
                "prompt": "{{ question | capitalize }}\nAnswer the question using a single word or phrase.",
                "metric": "vqa_accuracy-lmms",
            },
            "vlmevalkit": {"metric": "vqa_accuracy-vlmevalkit"},
        },
        "preset": "bench",
        "data": "TextVQA_0.5.1_val.json beside train_images/, or Parquet files of "
        "https://huggingface.co/datasets/lmms-lab/textvqa",
        "source": "arXiv 1904.08920; lmms-eval textvqa/utils.py, VLMEvalKit image_vqa.py",
    },
    "ocrbench": {
        "description": "OCRBench: reading text of ten kinds",
        "reader": "ocrbench",
        "metric": "ocrbench",
        "variants": {"lmms-eval": {"metric": "ocrbench-lmms"}},
        "preset": "bench",
        "data": "Parquet files of https://huggingface.co/datasets/echo840/OCRBench, OCRBench.json with its images, "
        "or VLMEvalKit's OCRBench.tsv",
        "source": "arXiv 2305.07895; lmms-eval ocrbench/utils.py, VLMEvalKit image_vqa.py",
    },
    "mmmu": {
        "description": "MMMU: college-level questions of 30 subjects",
        "reader": "mmmu",
        "metric": "mmmu",
        "prompt": "{{ question }}"
        + _OPTIONS
        + "\n\n{% if options %}"
        + _LETTER
        + "{% else %}Answer the question using a single word or phrase.{% endif %}",
        "variants": {
            "vlmevalkit": {
                "prompt": "Question: {{ question }}\n{% if options %}Options:"
                + _OPTIONS
                + "\nPlease select the correct answer from the options above. \n{% endif %}",
                "metric": "mmmu-vlmevalkit",
            },
        },
        "preset": "bench",
        "data": "Parquet files of https://huggingface.co/datasets/lmms-lab/MMMU, or of MMMU/MMMU, a folder for each "
        "subject",
        "source": "arXiv 2311.16502; lmms-eval mmmu/utils.py, VLMEvalKit image_mcq.py",
    },
    "mathvista": {
        "description": "MathVista: mathematics in images",
        "reader": "mathvista",
        "metric": "mathvista",
        "prompt": "{{ query }}",
        "variants": {
            "format": {"prompt": _MATHVISTA_FORMAT},
            "official": {"metric": "mathvista-official"},
        },
        "preset": "bench",
        "data": "testmini Parquet files of https://huggingface.co/datasets/AI4Math/MathVista; for its testmini.json, "
        "which has no prompts, use mathvista@format",
        "source": "arXiv 2310.02255: prompts of the data; lmms-eval mathvista/mathvista_evals.py (format)",
    },
    "videomme": {
        "description": "Video-MME: questions about videos from 11 seconds to an hour, without subtitles",
        "reader": "videomme",
        "metric": "videomme",
        "prompt": "Select the best answer to the following multiple-choice question based on the video. "
        + _LETTER_ONLY
        + "\n{{ question }}"
        + _OPTIONS
        + "\nThe best answer is:",
        "variants": {
            "lmms-eval": {
                "prompt": "Select the best answer to the following multiple-choice question based on the video and the "
                "subtitles. " + _LETTER_ONLY + "\n{{ question }}" + _OPTIONS + "\n\n" + _LETTER,
                "metric": "videomme-lmms",
            },
            "vlmevalkit": {
                "prompt": "\nThese are the frames of a video. Select the best answer to the following multiple-choice "
                "question based on the video. " + _LETTER_ONLY + "\nQuestion: {{ question }}" + _OPTIONS + "\nAnswer: ",
                "metric": "videomme-vlmevalkit",
            },
        },
        "preset": "bench",
        "data": "videomme/test-00000-of-00001.parquet of https://huggingface.co/datasets/lmms-lab/Video-MME, and the "
        "unpacked videos in data/ beside it or beside its folder",
        "source": "arXiv 2405.21075, its prompt without subtitles; lmms-eval videomme, VLMEvalKit videomme.py",
    },
}
