"""What a file's records mean, one module each. A layout is a module with:

    def mapping(columns: Sequence[str], first: Mapping[str, Any], reading: Reading) -> dict[str, str] | None
    def rows(records: Iterable[tuple[int, Mapping[str, Any]]], mapping: Mapping[str, str]) -> Iterator[Row | Dropped]

`mapping` says which column serves as what ({"question": "質問", ...}) in a file whose first record is `first`, None when the
file is of another layout. `rows` makes conversations of the records, with their text as it stands in the file; a record may
make several rows, or be left out with the reason (Dropped) or as malformed (Broken).
"""

# In the order in which they are tried: the telling ones first.
LAYOUTS = {
    "messages": "edgelora.data.layouts.messages",  # OpenAI
    "sharegpt": "edgelora.data.layouts.sharegpt",
    "tree": "edgelora.data.layouts.tree",  # OpenAssistant
    "thread": "edgelora.data.layouts.thread",
    "squad": "edgelora.data.layouts.squad",
    "instances": "edgelora.data.layouts.instances",  # Self-Instruct
    "choices": "edgelora.data.layouts.choices",
    "alpaca": "edgelora.data.layouts.alpaca",
    "qna-maker": "edgelora.data.layouts.qna_maker",
    "pairs": "edgelora.data.layouts.pairs",  # question and answer, prompt and completion, text and label
    "text": "edgelora.data.layouts.text",
}
