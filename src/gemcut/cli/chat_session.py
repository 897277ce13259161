"""ChatSession: the conversation at a terminal, message by message, and its /commands."""

from __future__ import annotations

import inspect
import secrets
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from gemcut.cli import output
from gemcut.cli.chat_full import make_room
from gemcut.cli.chat_input import ChatInput, state_folder, unquoted
from gemcut.cli.chat_report import write_report
from gemcut.cli.chat_view import MarkdownView, PlainView
from gemcut.cli.conversation import Conversation
from gemcut.cli.failures import explain
from gemcut.cli.files import read_text_file
from gemcut.cli.interrupt import quiet_keyboard, stop_request
from gemcut.engine.results import Completion
from gemcut.engine.sampling import SamplingParams
from gemcut.errors import GemcutError, ParameterError
from gemcut.gemma import Gemma
from gemcut.paths import expand
from gemcut.safety.watch import Watch, said
from gemcut.sampling_defaults import ResolvedSampling
from gemcut.settings import KEYS, known, parse
from gemcut.uses.room import Full, parse_full

_NEARLY_FULL = 0.9
_LONG = 3  # exchanges that nobody should lose without a question
_FULL = "/undo drops the last exchange, /clear starts anew, /save FILE keeps everything"


class ChatSession:
    """One conversation at a terminal. Whatever goes wrong with one message, the conversation stays."""

    def __init__(
        self,
        gemma: Gemma,
        sampling: dict[str, Any],
        *,
        conversation: Conversation | None = None,
        markdown: bool = True,
        history: Path | None = None,
        base: bool = False,
        full: Full = "ask",
        reports: Path | None = None,
    ) -> None:
        """``sampling`` is what was asked for; ``base``: not tuned to answer; ``full``: what to do when it is;
        ``reports``: where /flag writes, else the state folder."""
        self._reports = reports
        self._answer_id = f"chat-{secrets.token_hex(9)}"  # a name of the last answer, for a report
        self.gemma, self.sampling, self.markdown = gemma, sampling, markdown
        self.conversation = conversation or Conversation()
        self.console = Console(highlight=False)
        self.last: Completion | None = None
        self._last_used: ResolvedSampling | None = None  # what it was sampled with
        self.draft = ""  # what stands in the line when it is next shown
        self.used = 0  # tokens of the conversation
        self.attached: list[str] = []  # texts of files that go in front of the next message
        self._base, self._full = base, full
        self._saved = list(self.conversation.turns)  # what a file holds
        self._leave = False
        methods = [name for name in vars(ChatSession) if name.startswith("do_")]
        self._commands: dict[str, Callable[[str], None]] = {f"/{name[3:]}": getattr(self, name) for name in methods}
        self._input = ChatInput(self._commands, self._meter, history)
        self._count()

    def run(self) -> None:
        """Read messages and answer them until the person leaves."""
        interrupted = False  # whether Ctrl-C was pressed in an empty line just before
        try:
            while not self._leave:
                draft, self.draft = self.draft, ""
                try:
                    text = self._input.read(draft)
                except KeyboardInterrupt:
                    if interrupted:
                        self._try_to_leave()
                    else:
                        self._say("Ctrl-C again, Ctrl-D or /exit leaves.")
                    interrupted = not interrupted
                except EOFError:
                    self._try_to_leave()
                else:
                    interrupted = False
                    self._handle(text)
        except BaseException:  # a bug, or Ctrl-C where nobody waits for it
            self._rescue()
            raise

    def _handle(self, text: str) -> None:
        """A command or a message."""
        try:
            if any("\ud800" <= character <= "\udfff" for character in text):  # how bytes that are no UTF-8 arrive
                raise ParameterError("the message has bytes that are not UTF-8; set your terminal to UTF-8")
            if not text.startswith("/"):
                self.ask(unquoted(text))
                return
            name, _, rest = text.partition(" ")
            if name not in self._commands:
                self.draft = text
                raise ParameterError(
                    f'unknown command {name.split()[0]}; /help lists them (text that begins with / goes in """ """)'
                )
            self._commands[name](rest.strip())
        except Exception as error:
            if explain(error).code != 2:
                raise
            self._complain(error)

    def ask(self, question: str) -> bool:
        """Send a message, attached files in front, and show the answer; whether there is one.

        Where there is none the question comes back into the line, and files stay attached.
        """
        full = "\n\n".join([*self.attached, question])
        limit = self.gemma.engine.max_context
        self.draft = question
        self._make_room(full)
        messages = self.conversation.messages(full)
        ids = self.gemma.encode_messages(messages)
        length = len(ids)
        if length >= limit:
            raise ParameterError(
                f"the conversation with this message has {length:,} tokens, the context holds {limit:,}: {_FULL}; "
                "your message is back in the line"
            )
        fields = dict(self.sampling)
        if "max_new_tokens" in fields:
            fields["max_new_tokens"] = min(fields["max_new_tokens"], limit - length)
        used = self.gemma.resolve_sampling(length, fields, chat=True)
        with quiet_keyboard():
            watch = self.gemma.watch(said(messages))
        answer = self._stream(ids, used.params, watch)
        self.last, self._last_used = answer, used
        self._answer_id = f"chat-{secrets.token_hex(9)}"
        if answer.finish_reason == "cancelled" and not answer.text.strip():
            self._say("Stopped before the first word; your message is back in the line.")
            return False
        self.draft = ""
        # What a guard let out before it ended the answer, or its refusal: the roles have to alternate.
        self.conversation.add(full, answer.text or answer.refusal or "")
        self.attached.clear()
        self._count()
        self._remark(answer, limit)
        return True

    def _make_room(self, question: str) -> None:
        most = self.sampling.get("max_new_tokens")
        ask = self._input.ask if output.is_terminal(sys.stdin) else None
        make_room(self.gemma, self.conversation, question, self._full, most=most, ask=ask, say=self._say)
        self._count()

    def _stream(self, ids: list[int], params: SamplingParams, watch: Watch | None) -> Completion:
        view = MarkdownView(self.console) if self.markdown else PlainView(self.console)
        started = self.gemma.stream_ids(ids, params, watch=watch or False)
        with quiet_keyboard(), stop_request() as stop, started as stream:
            with view:
                for event in stream.events():
                    if event.text:
                        view.write(event.text)
                    if stop.pressed:
                        stream.cancel()
            return stream.result

    def _remark(self, answer: Completion, limit: int) -> None:
        """What a person should know of how an answer ended."""
        if answer.finish_reason == "cancelled":
            self._say("Stopped. What is there stays part of the conversation; /undo drops it.")
        elif answer.finish_reason == "content_filter":
            self._say(f"The guard ended this answer: {answer.refusal}")
        elif answer.finish_reason == "length" and answer.prompt_tokens + len(answer.token_ids) >= limit:
            self._say(f"The context of {limit:,} tokens is full and the answer ends here: {_FULL}.")
        elif answer.finish_reason == "length":
            self._say(f"Cut after {len(answer.token_ids):,} tokens (--max-new-tokens).")
        elif not answer.text.strip():
            self._say("The model answered nothing.")

    # ---- commands: one method each, its docstring is its help ----------------------------------------------------

    def do_help(self, rest: str) -> None:
        """/help: this list"""
        for command in self._commands.values():
            usage, _, meaning = (inspect.getdoc(command) or "").partition(": ")
            self.console.print(f"  [cyan]{usage:<16}[/] {meaning}")
        self.console.print(
            "\n  Enter sends, Alt-Enter adds a line. Pasted text waits for your Enter.\n"
            '  """ begins a text of several lines, """ and Enter send it.\n'
            "  Ctrl-C stops an answer, or clears the line. Ctrl-D leaves.\n"
            "  Up and Down bring back what you typed before."
        )

    def do_system(self, rest: str) -> None:
        """/system TEXT: set instructions; - removes them, alone shows them"""
        if rest:
            self._adopt(replace(self.conversation, system="" if rest == "-" else rest))
        system = self.conversation.system
        self._say(f"Instructions: {system}" if system else "No instructions.")

    def do_set(self, rest: str) -> None:
        """/set NAME VALUE: sampling: /set temperature 0.3; - takes it back, alone shows all"""
        name, _, text = rest.partition(" ")
        if not name:
            shown = self._resolved()
            for key in self._keys():
                value = getattr(shown.params, key)
                value = ", ".join(map(repr, value)) if key == "stop" else value
                self._say(f"{key:<18} {'none' if value in (None, '') else value:<8}  {shown.origin(key)}")
            return
        name = known(name, self._keys())
        before = dict(self.sampling)
        if text.strip() == "-":
            self.sampling.pop(name, None)
        elif text.strip():
            self.sampling[name] = parse(name, unquoted(text) if name == "stop" else text.strip(), name)
        try:
            shown = self._resolved()
        except GemcutError:
            self.sampling = before
            raise
        self._say(f"{name} is {getattr(shown.params, name)} ({shown.origin(name)}).")

    def do_file(self, rest: str) -> None:
        """/file PATH: put a file's text in front of your next message; - drops it"""
        if rest == "-":
            self.attached.clear()
            self._count()
            self._say("No file is attached.")
            return
        path = _path(rest, "/file")
        text = f"{path.name}:\n\n{read_text_file(path)}"
        tokens = len(self.gemma.tokenizer.encode(text, add_bos=False, parse_special=False))
        room = self.gemma.engine.max_context - self.used
        if tokens >= room:
            raise ParameterError(f"{path} has {tokens:,} tokens, the context has room for {max(0, room):,}: {_FULL}")
        self.attached.append(text)
        self._count()
        self._say(f"{path.name}, {tokens:,} tokens, goes in front of your next message; /file - drops it.")

    def do_full(self, rest: str) -> None:
        """/full HOW: when the context is nearly full: ask, drop, summarise or stop"""
        self._full = parse_full(rest, "/full") if rest else self._full
        self._say(f"When the context is nearly full: {self._full}.")

    def do_clear(self, rest: str) -> None:
        """/clear: forget the conversation, keep the instructions"""
        if not self._may_lose("Clear it?"):
            return
        self.conversation.turns, self.conversation.summary = [], ""
        self.attached.clear()
        self._saved = []
        self._count()
        self._say("A new conversation.")

    def do_retry(self, rest: str) -> None:
        """/retry: answer the last message again"""
        before = list(self.conversation.turns)
        if not before:
            raise ParameterError("nothing to answer again")
        params = self._resolved().params
        if params.greedy or params.seed is not None:
            why = "temperature 0" if params.greedy else "a seed"
            self._say(f"With {why} the answer is the same each time; /set changes it.")
        files, self.attached, draft = self.attached, [], self.draft
        summary, answered = self.conversation.summary, False
        self.conversation.turns = before[:-2]
        try:
            answered = self.ask(before[-2]["content"])
        finally:  # whatever went wrong, the answer that was there stays
            self.attached, self.draft = files, draft
            if not answered:
                self.conversation.turns, self.conversation.summary = before, summary
            self._count()

    def do_undo(self, rest: str) -> None:
        """/undo: drop the last exchange; its message comes back to be changed"""
        question = self.conversation.undo()
        if question is None:
            raise ParameterError("nothing to undo")
        self.draft = question
        self._count()

    def do_save(self, rest: str) -> None:
        """/save FILE: write the conversation as JSON"""
        path = _path(rest, "/save")
        name = self.gemma.source.name if self.gemma.source is not None else ""
        replaced = self.conversation.save(path, name)
        self._saved = list(self.conversation.turns)
        self._say(f"{'Replaced' if replaced else 'Saved'} {path}: {self._turns()}.")

    def do_load(self, rest: str) -> None:
        """/load FILE: go on with a saved conversation"""
        loaded = Conversation.load(_path(rest, "/load"))
        if not self._may_lose("Load another in its place?"):
            return
        self._adopt(replace(loaded, examples=self.conversation.examples))
        self._saved = list(self.conversation.turns)
        self._say(f"Loaded {self._turns()}, {self.used:,} tokens.")

    def do_stats(self, rest: str) -> None:
        """/stats: speed and tokens of the last answer"""
        lines = ["No answer yet."]
        if self.last is not None and self._last_used is not None:
            lines = output.stats_lines(self.gemma, self.last, self._last_used)
        lines.append(f"context  {self.used:,} of {self.gemma.engine.max_context:,} tokens, {self._turns()}")
        for line in lines:
            self._say(line)

    def do_flag(self, rest: str) -> None:
        """/flag REASON: report the last answer; words behind the reason are your comment"""
        texts = [turn["content"] for turn in self.conversation.turns[-2:]]
        self._say(write_report(self.gemma, rest, self._answer_id, texts, self._input.ask, self._reports))

    def do_exit(self, rest: str) -> None:
        """/exit: leave"""
        self._try_to_leave()

    def _try_to_leave(self) -> None:
        """Leave, after a question where that would lose a conversation."""
        # Ctrl-D once more, or a terminal that is gone, leaves.
        self._leave = self._may_lose("Leave without it?", at_end="y")

    def _may_lose(self, question: str, *, at_end: str = "n") -> bool:
        """Whether the conversation may be lost: a person is asked where a long one is in no file.

        ``at_end`` is the answer that Ctrl-D stands for.
        """
        turns = self.conversation.turns
        if turns == self._saved or len(turns) < 2 * _LONG or not output.is_terminal(sys.stdin):
            return True
        try:
            answer = self._input.ask(f"This conversation ({self._turns()}) is not saved. {question} [y/N]")
        except EOFError:
            answer = at_end
        except KeyboardInterrupt:
            answer = "n"
        if answer.lower() in ("y", "yes"):
            return True
        self._say("Still here; /save FILE keeps the conversation.")
        return False

    # ---- what is shown -------------------------------------------------------------------------------------------

    def _say(self, text: str) -> None:
        self.console.print(output.safe(text), style="dim", markup=False)

    def _complain(self, error: BaseException) -> None:
        message = explain(error).message.removeprefix("error: ")
        self.console.print(message, style="red", markup=False)

    def _meter(self) -> tuple[str, bool]:
        limit = self.gemma.engine.max_context
        # What would open the next turn is counted, too, and may lie beyond the limit: full is full.
        used = min(self.used, limit)
        share = used / limit
        warn = share >= _NEARLY_FULL
        bar = "█" * round(share * 10) + "░" * (10 - round(share * 10))
        hint = "nearly full: /undo, /clear or /save" if warn else "/help"
        kind = "base model · " if self._base else ""
        return f"  {kind}context {bar} {used:,} / {limit:,} tokens · {hint}", warn

    def _adopt(self, conversation: Conversation) -> None:
        """Go on with another conversation; where the model's chat format refuses it, the old one stays."""
        before, self.conversation = self.conversation, conversation
        try:
            self._count()
        except GemcutError:
            self.conversation = before
            raise

    def _count(self) -> None:
        """Count the conversation's tokens again, with the opening of the next turn."""
        conversation, files = self.conversation, "\n\n".join(self.attached)
        messages = conversation.messages(files or (None if conversation.turns or conversation.examples else ""))
        anything = conversation.messages() or files
        self.used = len(self.gemma.encode_messages(messages)) if anything else 0

    def _resolved(self) -> ResolvedSampling:
        """What the next answer is sampled with."""
        return self.gemma.resolve_sampling(self.used, self.sampling, chat=True)

    @staticmethod
    def _keys() -> list[str]:
        return [name for name, key in KEYS.items() if key.part == "sampling"]

    def _turns(self) -> str:
        exchanges = len(self.conversation.turns) // 2
        return "one exchange" if exchanges == 1 else f"{exchanges} exchanges"

    def _rescue(self) -> None:
        """After a bug: keep what was said."""
        if self.conversation.turns:
            path = state_folder() / "rescued_chat.json"
            try:
                path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                self.conversation.save(path, "")
            except (OSError, GemcutError):
                return
            output.note(f"the conversation was saved: /load {path}")


def _path(text: str, command: str) -> Path:
    text = text.strip("\"'")
    if not text:
        raise ParameterError(f"{command} needs the name of a file: {command} FILE")
    return expand(text)
