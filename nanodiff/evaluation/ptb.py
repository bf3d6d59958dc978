"""Words as the COCO caption program counts them: Penn Treebank's kind, lower case, without punctuation.

    tokenize("A man's dog (a \"Lab\") isn't here!!")      # "a man 's dog -lrb- a lab -rrb- is n't here !!"

COCO's numbers are of Stanford's PTBTokenizer (CoreNLP 3.4.1) and of a list of punctuation that is dropped afterwards (Chen et al. 2015,
arXiv 1504.00325 §3). That tokenizer is a lexer: at every place the longest text that one of its rules matches is a token, what no rule
matches is no token. So is this, with rules found by asking that program about 20,000 odd texts (captions with signs put in at random,
abbreviations, emoticons, every character of the basic plane): it answers otherwise on fewer than one in a thousand of them.
"""

import re

# What each of them joins to a word beside letters: marks that combine with the letter before
_MARKS = (
    "\u00ad\u02c2-\u02c5\u02d2-\u02df\u02e5-\u02eb\u02ed\u02ef-\u036f\u0375\u0384\u0385\u0483-\u0487\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5"
    "\u05c7\u0615-\u061a\u064b-\u065e\u0670\u06d6-\u06ed\u0711\u0730-\u074c\u07a6-\u07b0\u07eb-\u07f3\u0900-\u0903\u093c\u093e-\u094e\u0951-\u0955"
    "\u0962\u0963\u0981-\u0983\u09bc-\u09cd\u09d7\u0a01-\u0a03\u0a3c-\u0a4f\u0a81-\u0a83\u0abc-\u0acf\u0b82\u0bbe-\u0bcd\u0c01-\u0c03\u0c3e-\u0c56"
    "\u0d3e-\u0d48\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u0eb1\u0eb4-\u0ebc\u0ec8-\u0ecd"
)
_NO_LETTERS = "²³¹¼-¾⁰⁴-⁹₀-₉\u2150-\u218b①-⓿❶-➓\u3007\u3021-\u3029\u3038-\u303a㈠-㊿"  # numbers that Python's \w holds
_ASTRAL = "\U00010000-\U0010ffff"  # that program knows none of these
L = rf"(?:(?![{_NO_LETTERS}{_ASTRAL}])[^\W\d_]|[{_MARKS}])"
LD = rf"(?:{L}|\d)"
A = "['\u2019\u0092]"  # apostrophes
N = "['\u2019\u0092`\u2018\u0091\u201b]"  # and what is taken for them in n't
ENDS = "(?![A-Za-z])"
_CLITIC = rf"(?:'(?i:[msd]|re|ve|ll){ENDS}|[\u2019\u0092](?i:[msd]|re|ve|ll))"

_KEEP_POINT = (  # abbreviations whose point is theirs
    "mr|mrs|ms|drs?|profs?|sens?|reps?|attys?|lt|col|gen|messrs|govs?|adm|rev|maj|sgt|cpl|pvt|capt|ste?|ave|pres|lieut|hon|brig|co?mdr|pfc|spc"
    "|supts?|det|bldg|dept|elec|natl|invt|m[ft]g?|ft|mt|al|etc|vs|alex|wm|jos|cie|a\\.k\\.a|cf|treas"
)
_OTHERS = (  # the same, but what follows them in the same breath is no part of them: "inc.x"
    "jan|feb|mar|apr|jun|jul|aug|sep|sept|oct|nov|dec|mon|tue|tues|wed|thu|thurs|fri|ala|ariz|calif|colo|conn|ct|dak|fla|ga|ind|kans?|ky|md|mich|minn"
    "|mo|mont|neb|nev|okla|penn|tenn|va|vt|wisc?|wyo|jr|sr|bros|(?:ed|ph)\\.d|blvd|rd|esq|inc|cos?|corp|pp?tys?|ltd|plc|bancorp|bhd|assn|univ|intl|sys"
    "|est|ext|tel|sq"
)
_CAPITAL = "|".join(
    f"{w[0]}(?i:{w[1:]})" for w in ["Az", "Ark", "Del", "Ill", "La", "Mass", "Miss", "Ore", "Pa", "Tex", "Wash"]
)
_BEFORE_NUMBER = "figs?|prop|nos?|vols?|sect?s?|arts?|pp|op|approx|ca"
_WHOLE = (  # words with an apostrophe that stay whole
    f"li'l(?![A-Za-z])|c'mon|c'est|cap'n|nor'easter|s'mores?|nat'l|ev'ry|e'er|ol{A}|somethin{A}|dunkin{A}|{A}em|{A}till?|{A}cause|{A}n{A}|'n(?![A-Za-z.,;:])|\u2019n"
)
_QUOTES = "`‘’“”‛‹›«»\u0091-\u0094\u201a\u201e\u201f"
_RULES = [
    r"https?://[^\s\"<>|()]+[^\s\"<>|.!?(){},-]",
    r"(?:[Ww]{3}\.(?:[^\s\"<>|.!?(){},]+\.)+[a-zA-Z]{2,4}|(?:[^\s\"`'|!(){}$,-_]+\.)+(?:com|net|org|edu))(?:/[^\s\"<>|()]+[^\s\"<>|.!?(){},-])?",
    r"(?:<|&lt;)?[a-zA-Z0-9][^\s\"<>|()\u00a0]*@(?:[^\s\"<>|().\u00a0]+\.)*[^\s\"<>|().\u00a0]+(?:>|&gt;)?",
    r"@[a-zA-Z_][a-zA-Z_0-9]*",
    rf"\#{L}+",
    r"<(?:[!?][A-Za-z-][^>\r\n]*|/?[A-Za-z][\w:.-]*(?:\s+[A-Za-z][\w:.-]*(?:\s*=\s*(?:'[^']*'|\"[^\"]*\"|[\w:.-]+))?)*\s*/?)>",
    rf"(?P<t>(?i:can))not{ENDS}",
    rf"(?P<t>(?i:gon|got|wan))(?i:na|ta){ENDS}",
    rf"(?P<t>(?i:gim|lem))(?i:me){ENDS}",
    r"(?P<t>'[tT])(?i:is|was)",
    rf"(?P<t>[A-Za-z]*[A-MO-Za-mo-z])(?i:n{N}t)",
    rf"(?i:n{N}t){ENDS}",
    rf"(?P<t>[A-Za-z]+){_CLITIC}",
    _CLITIC,
    rf"(?i:{_WHOLE})",
    rf"{A}[2-9]0s{ENDS}",
    rf"{L}+[aeiouyAEIOUY]{N}[aeiouA-Z]{L}*",
    rf"[A-HJ-XZn]{A}{L}{L}+",
    rf"[lLdDjJ]{A}",
    rf"(?P<t>[yY]{A}){L}",
    r"[A-Z]*\$",
    r"(?i:c)\+\+|(?i:[cf])\#",
    r"\d{1,2}[-/]\d{1,2}[-/]\d{2,4}",
    r"[-+]?(?:\d*(?:[.:,\u00ad\u066b\u066c]\d+)+|\d+(?:[.:,\u00ad\u066b\u066c]\d+)*)",
    r"[⁺⁻₊₋]?(?:[⁰¹²³⁴-⁹]+|[₀-₉]+)",
    r"(?:\d{1,4}[- \u00a0])?\d{1,4}(?:\\?/|\u2044)\d{1,4}",
    r"\([0-9]{2,3}\)[ \u00a0]?[0-9]{3,4}[- \u00a0]?[0-9]{3,5}|(?:\+\+?[0-9]{2,4}[- \u00a0]?|[0-9]{2,4}[- \u00a0])[0-9]{2,4}[- \u00a0][0-9]{3,4}[- \u00a0]?[0-9]{3,5}",
    rf"(?:[dDoOlL]{A}{L})?{LD}+(?:-(?:[dDoOlL]{A}{L})?{LD}+)*",
    r"[A-Z]+(?:(?:[+&]|(?i:&amp;))[A-Z]+)+",
    r"[A-Za-z0-9]+(?:\.[A-Za-z0-9]+)*\.(?i:bat|bmp|cgi|docx?|exe|gif|gz|html?|jar|java|jpe?g|mov|mp3|pdf|php|png|pp|ps|py|sql|tar|txt|wav|xml|zip)",
    r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}(?:\\?/[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}){1,2}",
    r"(?P<t>[A-Za-z0-9][A-Za-z0-9.,\u00ad]*(?:-[A-Za-z0-9\u00ad]+)+)(?:[^a-zA-Z0-9.+]|$)",
    rf"{L}{LD}*(?:[.!?]{L}{LD}*)*",
    rf"(?P<t>{LD}+(?:[.!?]{L}{LD}*)*\.)[,;:\u3001]",
    rf"{LD}+(?:[-_]{LD}+)+",
    rf"(?:[A-Za-z](?:\.[A-Za-z])*|(?i:{_KEEP_POINT}))\.",
    rf"(?P<t>(?:(?i:{_OTHERS})|{_CAPITAL})\.)[\s\S]{{0,2}}",
    rf"(?P<t>(?i:{_BEFORE_NUMBER})\.)\s?\d",
    r"[<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]](?![A-Za-z0-9])",
    r"[\^x=~<>]\.[\^x=~<>]|[-^x=~<>']_[-^x=~<>']|\([-^x=~<>'][_.]?[-^x=~<>']\)",
    r"[!?]+",
    r"\.{3,5}|(?:\.[ \u00a0]){2,4}\.",
    r"-+|[\u2013-\u2015\u0096\u0097]",
    r"\*+|_+|\#{2,}|>{2,}|<{2,}",
    rf"''|``|[{_QUOTES}]{{1,2}}",
    r"(?i:&(?:lt|gt|amp|quot|apos|nbsp);)",
    r"&\#\d+;",
    r"[!-/:-@\[-`{-~\u0080\u0091-\u0094\u00a1-\u00bf×÷\u02c6\u0374\u037e\u0387\u055a-\u055f\u0589\u05be\u05c0\u05c3\u05f3\u05f4\u060c\u061b\u061f\u066a\u066d\u06d4"
    r"\u0964\u0965\u0e3f\u0e4f\u2016-\u2023\u2026\u2030-\u203b\u203e-\u2042\u2044\u207a-\u207e\u208a-\u208e\u20a0\u20a4\u20ac\u2100-\u214f\u2155-\u215e\u2153\u2154"
    r"\u2190-\u2bff\u3001\u3002\u3012\u30fb\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65\uffe0\uffe1\uffe5\uffe6]",
]
_RULES = [re.compile(rule) for rule in _RULES]
_PLAIN = re.compile(r"[A-Za-z]+(?=\s|$)")  # most words: nothing longer can begin there
_IRREGULAR = {"cannot", "gonna", "gotta", "wanna", "gimme", "lemme"}
_WRITTEN = {  # what a token is written as
    "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-", "£": "#", "€": "$", "¤": "$", "₠": "$", "\u0080": "$",
    "¢": "cents", "¼": "1/4", "½": "1/2", "¾": "3/4", "⅓": "1/3", "⅔": "2/3", "&amp;": "&", "&lt;": "<", "&gt;": ">",
}  # fmt: skip
_BRACKETS = str.maketrans({k: v for k, v in _WRITTEN.items() if k in "()[]{}"})
_STRAIGHT = str.maketrans(
    dict.fromkeys("\u2019\u0092›", "'")
    | dict.fromkeys("\u2018\u0091‛‹", "`")
    | dict.fromkeys("”\u0094»", "''")
    | dict.fromkeys("“\u0093«", "``")
)
_DROPPED = set("'`\".?!,:-;«»‹›‘’‛“”\u0091\u0092\u0093\u0094…") | {
    "''",
    "``",
    "--",
    "...",
    "&quot;",
    "&apos;",
    "&nbsp;",
}


def tokenize(text):
    """Lower-case words without punctuation, joined by single spaces. See the module docstring."""
    words, at = [], 0
    while at < len(text):
        plain = _PLAIN.match(text, at)
        if plain and plain[0].lower() not in _IRREGULAR:
            words.append(plain[0].lower())
            at = plain.end()
            continue
        longest = max((m for rule in _RULES if (m := rule.match(text, at))), key=re.Match.end, default=None)
        if longest is None:
            at += 1
            continue
        token = longest["t"] if "t" in longest.re.groupindex else longest[0]
        at += len(token)
        words += _written(token)
    return " ".join(words)


def _written(token):
    """A token as it is counted: [] for punctuation."""
    token = token.lower().replace("\u00ad", "" if len(token) > 1 else "-")
    if re.fullmatch(r"-{2,4}|[\u2013-\u2015\u0096\u0097]|\.{3,5}|(?:\.[ \u00a0])+\.", token):
        return []
    if re.fullmatch(f"[{_QUOTES}]{{1,2}}|n{N}t|{A}(?:[msd]|re|ve|ll)", token):
        token = token.translate(_STRAIGHT)
    if token in _DROPPED:
        return []
    token = _WRITTEN.get(token, token)
    if any(c in "()[]{}" for c in token):
        token = token.translate(_BRACKETS)
    return [re.sub("[ \u00a0]", "\u00a0", token)]
