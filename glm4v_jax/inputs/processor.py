"""`Glm4vProcessor`: messages, images and videos to what the model takes.

The names, arguments and results are those of `Glm4vProcessor` in transformers 4.57.1, with NumPy arrays in the place of
torch tensors and the error handling of 5.x; images and videos may stand in one prompt in any order. Which member of the
family it is for, it reads from the checkpoint's files: `PROCESSORS` in `config/family.py`.
"""

import pathlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

from glm4v_jax.config.checks import fault
from glm4v_jax.config.family import processors_of
from glm4v_jax.config.model import Glm4vConfig
from glm4v_jax.config.thinking import ThinkingFormat, thinking_format
from glm4v_jax.errors import CheckpointError, MessageError, naming, not_there
from glm4v_jax.files import assets_directory
from glm4v_jax.inputs.batch_feature import BatchFeature
from glm4v_jax.inputs.prepared_media import MultiModalData, PreparedMedia
from glm4v_jax.inputs.processor_files import (
    ImageProcessor,
    image_class,
    other_models_named,
    processor_class_in,
    read_part,
)
from glm4v_jax.inputs.processor_options import OPTIONS, sort_options
from glm4v_jax.inputs.text.chat_template import (
    choose_template,
    generation_marks,
    has_generation_blocks,
    load_chat_template,
    render_conversation,
    save_chat_template,
    template_variables,
)
from glm4v_jax.inputs.text.encode import encode_prompts
from glm4v_jax.inputs.text.literals import Literals
from glm4v_jax.inputs.text.messages import Message, extract_media, normalise_messages
from glm4v_jax.inputs.text.placeholders import VIDEO_TAGS, Expander, Expansion, Row, expand_image, expand_video
from glm4v_jax.inputs.text.tokenizer import Glm4vTokenizer
from glm4v_jax.inputs.text.tokenizer_options import check_text
from glm4v_jax.inputs.vision.settings import refuse_area_options
from glm4v_jax.inputs.vision.video import Glm4vVideoProcessor

_PerRow = tuple[Sequence[int] | None, Sequence[int] | None]
"""How many images, and how many videos, belong to each prompt, where that is known."""

_TOKENIZER_SETTINGS = frozenset(
    {"padding_side", "truncation_side", "model_max_length", "pad_token", "clean_up_tokenization_spaces"}
)


class Glm4vProcessor:
    """An image processor, a tokenizer and a video processor, put together.

    >>> import numpy as np
    >>> from glm4v_jax.tiny import TINY_CHECKPOINT
    >>> processor = Glm4vProcessor.from_pretrained(TINY_CHECKPOINT)
    >>> items = [{"type": "image", "image": np.zeros((56, 84, 3), np.uint8)}, {"type": "text", "text": "What is this?"}]
    >>> inputs = processor.apply_chat_template(
    ...     [{"role": "user", "content": items}], add_generation_prompt=True, tokenize=True, return_dict=True
    ... )
    >>> inputs.input_ids.shape, inputs.pixel_values.shape, inputs.image_grid_thw.tolist()
    ((1, 24), (48, 1176), [[1, 6, 8]])

    Attributes:
      image_processor, tokenizer, video_processor: the parts.
      chat_template: template source, {name: source}, or None.
      image_token, image_token_id, video_token, video_token_id: the placeholders.
      row: what the processor of this member of the family does differently.
    """

    def __init__(
        self,
        image_processor: ImageProcessor,
        tokenizer: Glm4vTokenizer,
        video_processor: Glm4vVideoProcessor,
        chat_template: str | dict[str, str] | None = None,
        processor_class: str | None = None,
    ) -> None:
        """Put the parts together; `processor_class` is what a checkpoint's files say, if not what their parts go by.

        Raises:
          CheckpointError: the tokenizer lacks a placeholder.
          ConfigError: the class is another family's.
        """
        named = processor_class is not None
        self.row = processors_of("processor_class", processor_class) if named else video_processor.row
        self.image_processor = image_processor
        self.tokenizer = tokenizer
        self.video_processor = video_processor
        self.chat_template = chat_template
        self._directory: pathlib.Path | None = None
        self.image_token = str(tokenizer.special_tokens_map.get("image_token", "<|image|>"))
        self.video_token = str(tokenizer.special_tokens_map.get("video_token", "<|video|>"))
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        for token, index in ((self.image_token, self.image_token_id), (self.video_token, self.video_token_id)):
            if index is None or index == tokenizer.unk_token_id:
                raise CheckpointError(f"the tokenizer lacks {token}; expected the tokenizer of a GLM-4.1V model")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | pathlib.Path,
        *,
        use_fast: bool | None = None,
        chat_template: str | None = None,
        **overrides: Any,
    ) -> Self:
        """Read the processor of a checkpoint directory.

        Args:
          pretrained_model_name_or_path: a directory (nothing is downloaded) with `tokenizer.json`,
            `tokenizer_config.json`, `preprocessor_config.json`, and if need be `video_preprocessor_config.json` and
            `chat_template.jinja`; or `processor_config.json` of 5.x.
          use_fast: choose between `Glm4vImageProcessorFast` and `Glm4vImageProcessor`, which resize as torchvision and
            as Pillow; None is what the files say.
          chat_template: wins over that of the files.
          **overrides: settings of the parts, such as `size` or `padding_side`.

        Raises:
          CheckpointError: a file is missing or corrupt, or is that of another kind of model.
          ConfigError: `min_pixels` and the like, which calls and items of messages take; or config.json is that of a
            model that does not run here.
        """
        directory = assets_directory(pretrained_model_name_or_path)
        if not directory.is_dir():
            raise CheckpointError(not_there(directory, "a checkpoint in Hugging Face layout", kind="directory"))
        settings = {name: value for name, value in overrides.items() if name in _TOKENIZER_SETTINGS}
        refuse_area_options(overrides)
        with other_models_named(directory):
            image_processor = read_part(image_class(directory, use_fast), directory, overrides)
            video_processor = read_part(Glm4vVideoProcessor, directory, overrides)
            tokenizer = Glm4vTokenizer.from_pretrained(directory, **settings)
            processor_class = processor_class_in(directory)
        if unknown := sorted(set(overrides) - {*settings, *image_processor.defaults, *video_processor.defaults}):
            warnings.warn(f"unknown settings of the processor are ignored: {', '.join(unknown)}", stacklevel=2)
        templates = load_chat_template(directory) if chat_template is None else chat_template
        with naming(directory, CheckpointError):
            processor = cls(
                image_processor, tokenizer, video_processor, chat_template=templates, processor_class=processor_class
            )
            processor.template_variables  # noqa: B018  that it is a template
        processor._directory = directory
        return processor

    def check_ids(self, config: Glm4vConfig) -> None:
        """Check that a model looks for images and videos where this processor puts them.

        Raises:
          CheckpointError: a token has one id in config.json and another in the tokenizer's files.
        """
        tokens = {"image_token_id": self.image_token}
        tokens |= dict(zip(("video_start_token_id", "video_end_token_id"), VIDEO_TAGS, strict=True))
        for field, token in tokens.items():
            found, index = getattr(config, field), self.tokenizer.convert_tokens_to_ids(token)
            if index not in (found, None, self.tokenizer.unk_token_id):
                place = self._directory / "config.json" if self._directory else "config.json"
                raise CheckpointError(f"{place}: " + fault(field, found, f"{index}, as the tokenizer has {token}"))

    def template(self, wanted: str | None = None) -> str:
        """Return the source of the chat template to render, by name, as source or the default one.

        Raises:
          CheckpointError: there is none.
        """
        return choose_template(self.chat_template, wanted, where=self._directory or "chat_template")

    @property
    def has_template(self) -> bool:
        """Whether there is a default chat template."""
        return self._default_template() is not None

    @property
    def template_variables(self) -> frozenset[str]:
        """What the default chat template reads besides messages; nothing where there is none."""
        template = self._default_template()
        return frozenset() if template is None else template_variables(template)

    @property
    def thinking(self) -> ThinkingFormat:
        """How the model writes thoughts, by its chat template and tokenizer."""
        return thinking_format(self._default_template(), self.tokenizer.get_added_vocab().__contains__)

    def _default_template(self) -> str | None:
        return self.chat_template.get("default") if isinstance(self.chat_template, dict) else self.chat_template

    def save_pretrained(self, save_directory: str | pathlib.Path) -> None:
        """Write the files of the parts and the chat template, which `from_pretrained` here and in transformers loads.

        Args:
          save_directory: made if need be; other files in it stay.
        """
        for part in (self.tokenizer, self.image_processor, self.video_processor):
            part.processor_class = self.row.processor
            part.save_pretrained(save_directory)
        save_chat_template(save_directory, self.chat_template)

    @property
    def model_input_names(self) -> list[str]:
        """What a call may return for the model."""
        return [
            *self.image_processor.model_input_names,
            *self.tokenizer.model_input_names,
            *self.video_processor.model_input_names,
        ]

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | Sequence[Sequence[str]] | None = None,
        videos: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Prepare prompts with their images and videos.

        Args:
          images: an image or lists of images, in the order of the placeholders; see `Glm4vImageProcessor`. With one
            list for each prompt, each prompt gets its own.
          text: one prompt or B prompts, with `<|image|>` and `<|video|>` where the media go; with
            `is_split_into_words`, B lists of words.
          videos: a video or lists of videos, in the order of the placeholders; see `Glm4vVideoProcessor`.
          **kwargs: options of the tokenizer (`padding`, `max_length`, ...), of the image and the video processor
            (`size`, `max_pixels`, `fps`, `video_metadata`, ...), by themselves or in `text_kwargs`, `images_kwargs`,
            `videos_kwargs` and `common_kwargs`; `return_metadata` to get `video_metadata` back;
            `return_mm_token_type_ids`; `return_tensors`, None or "np".

        Returns:
          `input_ids` and `attention_mask` [B, T] int64, arrays if all rows have the same length and lists of lists
          otherwise; with `return_mm_token_type_ids`, `mm_token_type_ids` alike: 0 text, 1 image, 2 video, as in 5.x.
          `pixel_values` [P, C * temporal_patch_size * patch_size**2] float32 and `image_grid_thw` [N, 3] int64 where
          there are images; `pixel_values_videos` and `video_grid_thw` where there are videos.

        Raises:
          MessageError: more or fewer images or videos than placeholders; rows of unequal length with
            `return_tensors="np"`; truncation that cuts off image tokens.
          MediaError: an image or video cannot be loaded or prepared.
          ConfigError: an option has an impossible value.
        """
        images_per_row = None
        if isinstance(images, (list, tuple)) and images and all(isinstance(row, (list, tuple)) for row in images):
            images_per_row = [len(row) for row in images]
        return self._prepare(images, text, videos, kwargs, (images_per_row, None))

    def _prepare(
        self,
        images: Any,
        text: Any,
        videos: Any,
        kwargs: Mapping[str, Any],
        per_row: _PerRow,
        marks: Mapping[str, str] | None = None,
    ) -> BatchFeature:
        options, return_tensors = sort_options(kwargs)
        rows = _checked_text(text, options["text_kwargs"])
        media = self._prepare_media(images, videos, options)
        return self._join(rows, media, options["text_kwargs"], return_tensors, per_row=per_row, marks=marks)

    def prepare_media(self, images: Any = None, videos: Any = None, **kwargs: Any) -> PreparedMedia:
        """Prepare images and videos by themselves, for prompts that will show them more than once; see `assemble`.

        Args:
          images: an image or lists of images; see `Glm4vImageProcessor`.
          videos: a video or lists of videos; see `Glm4vVideoProcessor`.
          **kwargs: options of a call, such as `size` or `fps`.

        Raises:
          MediaError: an image or video cannot be loaded or prepared.
        """
        return self._prepare_media(images, videos, sort_options(kwargs)[0])

    def assemble(self, text: str | Sequence[str], media: PreparedMedia, **kwargs: Any) -> BatchFeature:
        """A call with images and videos that are prepared already.

        Args:
          text: one prompt or B prompts, with `<|image|>` and `<|video|>` where the media go.
          media: all of them, in the order of their placeholders (`PreparedMedia.joined`).
          **kwargs: options of the tokenizer.

        Raises:
          MessageError: more or fewer images or videos than placeholders.
        """
        options, return_tensors = sort_options(kwargs)
        rows = _checked_text(text, options["text_kwargs"])
        return self._join(rows, media, options["text_kwargs"], return_tensors)

    def prepare_turn(self, messages: Sequence[Message], media: PreparedMedia, **variables: Any) -> BatchFeature:
        """Prepare the prompt for the next message of the assistant, with images and videos that are prepared already.

        The same as `apply_chat_template`, except that what messages say is text: special tokens in it, such as
        `<|image|>`, are ordinary characters. See `text.literals`.

        Args:
          messages: a conversation; see `apply_chat_template`.
          media: its images and videos, in its order (`PreparedMedia.joined`).
          **variables: for the chat template, such as `tools`.

        Raises:
          MessageError: the conversation is malformed, or does not match its images and videos.
        """
        literals = Literals(self.tokenizer)
        variables = {name: literals.marked_value(value) for name, value in variables.items()}
        # In their final form: JSON can hide a special token in escapes.
        messages = literals.marked(normalise_messages(messages, self.template()))
        prompt = self.apply_chat_template(messages, add_generation_prompt=True, **variables)
        check_text([prompt], is_split_into_words=False)
        bos = self.tokenizer.bos_token
        options = {"add_special_tokens": False} if bos is not None and prompt.startswith(bos) else {}
        return self._join([prompt], media, options, literals=literals)

    def _prepare_media(self, images: Any, videos: Any, options: Mapping[str, dict[str, Any]]) -> PreparedMedia:
        features = BatchFeature()
        image_expansions: list[Expansion] = []
        video_expansions: list[Expansion] = []
        sizes: list[tuple[int, int]] = []
        image_options, video_options = options["images_kwargs"], options["videos_kwargs"]
        if not _is_empty(images):
            found, sizes = self.image_processor.prepare_with_sizes(images, image_options)
            features |= found
            merge_size = image_options.get("merge_size") or self.image_processor.merge_size
            image_expansions = [expand_image(grid, merge_size, self.image_token) for grid in found["image_grid_thw"]]
        if not _is_empty(videos):
            features |= self.video_processor(videos, **{**video_options, "return_metadata": True})
            merge_size = video_options.get("merge_size") or self.video_processor.merge_size
            video_expansions = [
                expand_video(grid, metadata, merge_size, self.image_token, self.row.time_text)
                for grid, metadata in zip(features["video_grid_thw"], features["video_metadata"], strict=True)
            ]
            if not video_options.get("return_metadata"):
                del features["video_metadata"]
        return PreparedMedia(features, image_expansions, video_expansions, tuple(sizes))

    def _join(
        self,
        rows: list[Row],
        media: PreparedMedia,
        text_options: Mapping[str, Any],
        return_tensors: str | None = None,
        *,
        per_row: _PerRow = (None, None),
        literals: Literals | None = None,
        marks: Mapping[str, str] | None = None,
    ) -> BatchFeature:
        """Put prompts and media together; see `encode_prompts` for `literals` and `marks`."""
        expand = Expander(self.image_token, self.video_token, media.images, media.videos, *per_row)
        expanded, types = expand(rows)
        fields = encode_prompts(
            expanded,
            types,
            self.tokenizer,
            self.image_token,
            text_options,
            return_tensors,
            literals=literals,
            marks=marks,
        )
        return BatchFeature(fields | media.features)

    def apply_chat_template(
        self,
        conversation: Sequence[Message] | Sequence[Sequence[Message]],
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        return_assistant_tokens_mask: bool = False,
        **kwargs: Any,
    ) -> Any:
        """From messages to prompts, and with `tokenize` to what the model takes, images and videos included.

        Args:
          conversation: messages with `role` and `content`, or B such conversations. Contents are text or lists of
            `{"type": "text", "text": ...}`, `{"type": "image", KEY: ...}` with KEY one of image, url, path, base64, and
            `{"type": "video", KEY: ...}` with KEY one of video, url, path; or have the shapes of OpenAI's clients, see
            `normalise_messages`. Images and videos may have `min_pixels`, `max_pixels`, `resized_height` and
            `resized_width` of their own, and videos `fps`: of frames the rate at which they were taken, of a file the
            rate at which to take them.
          chat_template: the name of a template of the checkpoint, or a template.
          add_generation_prompt: end the prompt where the assistant begins to speak.
          continue_final_message: end it inside the last message, for the model to continue.
          tokenize: prepare the inputs, not only the text.
          return_dict: with `tokenize`, return everything, not only `input_ids`.
          tools, documents: for templates that know them.
          return_assistant_tokens_mask: with `tokenize` and `return_dict`, return `assistant_masks` [B, T] too: 1 for
            tokens inside of `{% generation %}` blocks of the template. GLM-4.1V's own has none.
          **kwargs: with `tokenize`, options of a call (`padding`, `fps`, `do_sample_frames`, ...; `fps` or `num_frames`
            turns sampling on); everything else goes to the template.

        Returns:
          A prompt, or a list of B prompts; with `tokenize` the `input_ids` of a call, with `return_dict` all of it.

        Raises:
          MessageError: a conversation is malformed, has a role or type that the template would drop, or images and
            videos that do not match the prompt.
          MediaError: an image or video cannot be loaded or prepared.
          CheckpointError: there is no template, or it does not parse.
        """
        source = self.template(chat_template)
        marks = generation_marks() if return_assistant_tokens_mask else {}
        if marks and not (tokenize and return_dict):
            raise MessageError("return_assistant_tokens_mask: found alone; expected tokenize and return_dict with it")
        if marks and continue_final_message:
            raise MessageError(
                "return_assistant_tokens_mask: found with continue_final_message; expected one of the two"
            )
        if marks and not has_generation_blocks(source):
            warnings.warn("return_assistant_tokens_mask: the chat template has no {% generation %} block", stacklevel=2)
        if tools and (isinstance(tools, Mapping) or not all(isinstance(tool, Mapping) for tool in tools)):
            raise MessageError(fault("tools", tools, "a list of objects"))
        options = {name: value for name, value in kwargs.items() if name in OPTIONS}
        variables = {name: value for name, value in kwargs.items() if name not in OPTIONS}
        given = {name for name, value in (("tools", tools), ("documents", documents)) if value}
        unknown = sorted((given | variables.keys()) - template_variables(source))
        if unknown:
            warnings.warn(
                f"unknown to the processor and to the chat template, and ignored: {', '.join(unknown)}", stacklevel=2
            )
        batched = isinstance(conversation, (list, tuple)) and any(isinstance(c, (list, tuple)) for c in conversation)
        conversations: list[Any] = list(conversation) if batched else [conversation]
        wheres = [f"conversation {index}, " if batched else "" for index in range(len(conversations))]
        prompts = [
            render_conversation(
                messages,
                source,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                where=where,
                **{"tools": tools, "documents": documents, **self.tokenizer.special_tokens_map, **variables, **marks},
            )
            for messages, where in zip(conversations, wheres, strict=True)
        ]
        if not tokenize:
            return prompts if batched else prompts[0]
        media = [extract_media(m, source, where) for m, where in zip(conversations, wheres, strict=True)]
        images, videos = [row[0] for row in media], [row[1] for row in media]
        bos = self.tokenizer.bos_token
        if bos is not None and prompts[0].startswith(bos):
            options["add_special_tokens"] = False
        if options.get("fps") is not None or options.get("num_frames") is not None:
            options.setdefault("do_sample_frames", True)
        per_row = ([len(row) for row in images], [len(row) for row in videos])
        inputs = self._prepare(images, prompts, videos, options, per_row, marks)
        return inputs if return_dict else inputs["input_ids"]

    def decode(self, token_ids: Any, **kwargs: Any) -> Any:
        """`Glm4vTokenizer.decode`."""
        return self.tokenizer.decode(token_ids, **kwargs)

    def batch_decode(self, sequences: Any, **kwargs: Any) -> list[str]:
        """`Glm4vTokenizer.batch_decode`."""
        return self.tokenizer.batch_decode(sequences, **kwargs)

    def post_process_image_text_to_text(
        self,
        generated_outputs: Any,
        skip_special_tokens: bool = True,
        clean_up_tokenization_spaces: bool = False,
    ) -> list[str]:
        """The texts of generated ids [B, T] or [T]; one text for every entry of the first axis, as in the reference."""
        return self.tokenizer.batch_decode(generated_outputs, skip_special_tokens, clean_up_tokenization_spaces)

    def get_num_multimodal_tokens(
        self,
        image_sizes: Sequence[Sequence[int]] | Sequence[int] | None = None,
        video_sizes: Sequence[Sequence[int]] | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> MultiModalData:
        """How many tokens and patches images and videos will have, from their sizes alone.

        Args:
          image_sizes: (height, width) in pixels of each image, or of one.
          video_sizes: (frames taken, height, width) of each video, or of one.
          **kwargs: settings of the processors, such as `size`.

        Raises:
          MediaError: a size that cannot be prepared.
        """
        options, _ = sort_options(kwargs)
        patches = tokens = video_tokens = None
        if image_sizes is not None:
            chosen = options["images_kwargs"]
            merge_size = chosen.get("merge_size") or self.image_processor.merge_size
            patches = [
                self.image_processor.get_number_of_image_patches(height, width, chosen)
                for height, width in _several(image_sizes)
            ]
            tokens = [count // merge_size**2 for count in patches]
        if video_sizes is not None:
            chosen = options["videos_kwargs"]
            merge_size = chosen.get("merge_size") or self.video_processor.merge_size
            video_tokens = [
                self.video_processor.get_num_of_video_patches(frames, height, width, chosen) // merge_size**2
                for frames, height, width in _several(video_sizes)
            ]
        return MultiModalData(tokens, patches, video_tokens)


def _checked_text(text: Any, options: Mapping[str, Any]) -> list[Row]:
    if not isinstance(text, Iterable):
        found = "nothing" if text is None else type(text).__name__
        raise MessageError(f"text: found {found}; expected a prompt or a list of prompts")
    rows: list[Row] = [text] if isinstance(text, str) else list(text)
    check_text(rows, bool(options.get("is_split_into_words")))
    return rows


def _several(sizes: Any) -> Sequence[Sequence[int]]:
    """Sizes, of which there may be only one."""
    return [sizes] if len(sizes) and not hasattr(sizes[0], "__len__") else sizes


def _is_empty(media: Any) -> bool:
    """Whether there is nothing: None, or lists of nothing."""
    return media is None or (isinstance(media, (list, tuple)) and all(_is_empty(item) for item in media))
