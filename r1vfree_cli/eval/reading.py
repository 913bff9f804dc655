"""The rule judge: does a reply say yes, no, or neither? Three-valued, offline, and the same for every protocol."""

import html
import re
import unicodedata
from collections.abc import Iterable

from ..core.prompts import parse
from ..core.thinking import without_thinking

YES, NO = "yes", "no"
_AS = dict.fromkeys(["yes", "yeah", "yep", "yup", "oui", "sí", "sim", "ja", "да", "はい", "네", "예"], YES)
_AS |= dict.fromkeys(["no", "nope", "nah", "non", "não", "nein", "нет", "いいえ", "아니요", "아니오"], NO)
_ANY = "|".join(_AS)

# A part under a heading of its own ("<caption>", "<critique>") is no answer either where another part is left.
_PART = re.compile(r"<(/?)([a-z][\w:-]{1,30})>", re.I)
_ANSWERS = re.compile(
    r"(?i)(?:.*(?:answer|conclusion|verdict|response|reply|output|result|choice|final).*|[bipqus]|h\d|em|br|li|ul|ol|div|"
    r"span|strong|code|pre|mark|font|center|body|html|table|t[rdh])"
)


def _without_parts(text: str) -> str:
    opened: dict[str, int] = {}
    parts = []
    for m in _PART.finditer(text):
        name = m[2].lower()
        if not m[1] and not _ANSWERS.fullmatch(name):
            opened.setdefault(name, m.start())
        elif name in opened:
            parts.append((opened.pop(name), m.end()))
    left, at = "", 0
    for start, end in sorted(parts):
        left += text[at:start] + " " if start >= at else ""
        at = max(at, end)
    left += text[at:]
    return left if re.search(r"\w", _TAG.sub("", left.lower())) else text


# --- to plain words --------------------------------------------------------------------------------------------

_WRAPPED = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox|emph)\s*\{([^{}]*)\}")
_BOX = re.compile(
    r"\\f?boxed\s*(?:\{([^{}]*)\}?|(\w+))|<\|begin_of_(?:box|answer|solution)\|>(.*?)(?:<\|end_of_\w+\|>|$)", re.S
)
_TAG = re.compile(rf"</?(?!(?:{_ANY})>)[a-z][^<>]{{0,40}}>")
_MARKUP = re.compile(r"[*_`#\"“”„«»「」『』'‘$|~\\]+(?!s\b)")
_LONE_IN_BRACKETS = re.compile(rf"[(\[{{]\s*({_ANY})\s*[.!]?\s*[)\]}}]")
_CHOICE = re.compile(
    r"\b(?:yes\s*(?:/|\bor\b)\s*(?:a\s+)?no|no\s*(?:/|\bor\b)\s*(?:a\s+)?yes)\b|\byes\s*,\s*no\b(?=\s*(?:[^\w\s]|or\b|$))"
)
_CHINESE_CHOICE = re.compile(r"(?:是|有|对|正确)\s*(?:/|\||或者?|还是)\s*(?:否|不是|没有|不对|错误?|不正确)")
_SURELY = re.compile(r"\b(?:of course|(?:without|no)(?: an?y?)? (?:doubt|question)(?: about (?:it|that))?)\b")
# "Both yes and no"
_PAIRED = re.compile(r"\b(?:yes[\s|=!<>&+]*(?:and\s)?\s*no|no[\s|=!<>&+]*(?:and\s)?\s*yes)\b(?!\s+(?!yes\b|no\b)[a-z])")
_NUMBER = re.compile(rf"\b(?:{_ANY})\.?\s*\d+")  # "No. 3"
_OPTION = re.compile(r"(?<![\w'])([a-d1-4])\s*[.):]\s*\(?(yes|no)\b")
_LETTER = re.compile(r"\b((?:answer|choice|option|choose|select|pick)\b[^.\n]{0,20}?)(?<![\w'])([a-d1-4])(?!\w)")
_SIMPLIFIED = str.maketrans("沒對錯確認為覺選擇結論斷還說終", "没对错确认为觉选择结论断还说终")
_QUOTED_CHINESE = re.compile(r"[“”「」『』\"'‘’](?=[\u3400-\u9fff])|(?<=[\u3400-\u9fff])[“”「」『』\"'‘’]")
_CHINESE = re.compile(
    r"(?:^|(?<=\W))(?:所以|因此|综上所述|综上|故|那么)?,?\s*"
    r"(?P<said>(?:我(?:认为|觉得|相信|想)\s*)?(?:(?P<final>最终|最后)的?)?(?:我的|正确)?"
    r"(?:答案|回答|结论|判断|选择|结果|答)(?:应该|应当|应|就)?(?:是|为)?+\s*:?\s*|我(?:会|就)?(?:认为|觉得|相信|想|选择|选|说)\s*|"
    r"(?:这个?|该|此|上述|题目的?)?(?:说法|陈述|描述|命题|观点|表述)(?:是|为)?+)?"
    r"(?:当然|显然|其实|确实|应该|看起来|并|完全|绝对)?"
    r"(?:(?P<yes>没有?错|是(?:这样)?的?|有的?|对的?|肯定的?|正确的?|存在的?)"
    r"|(?P<no>不是(?:这样)?的?|没有的?|不对的?|否定的?|不正确的?|错误的?|不存在的?|否|不|没|错)(?!\W*(?:yes|no)\b))"
    r"(?=\s*(?:[^\w\s:{\[]|$|\n))"
)


def _plain(text: str) -> str:
    """Lower case, without reasoning, tags, emphasis, the names of the choices; boxed answers as "final answer: ..."."""
    answer = parse(text).answer
    if answer is None:
        answer = _without_parts(without_thinking(text))
        answer = answer[answer.rfind("<answer>") + len("<answer>") :] if "<answer>" in answer else answer
    plain = unicodedata.normalize("NFKC", html.unescape(answer)).lower().replace("’", "'").translate(_SIMPLIFIED)
    plain = _WRAPPED.sub(r" \1 ", plain)
    plain = _BOX.sub(lambda m: f"\nfinal answer: {m[1] or m[2] or m[3] or ''}\n", plain)
    plain = _TAG.sub(" ", re.sub(r"<\|[^<>|]{1,40}\|>", "\n", plain))
    plain = re.sub(r"n't\b", " not", re.sub(r"\bcan(?:'t|not)\b", "can not", plain))
    plain = _one_space(_MARKUP.sub(" ", _QUOTED_CHINESE.sub("", plain)))
    plain = _CHINESE.sub(_translated, _SURELY.sub("surely", _CHINESE_CHOICE.sub(" ", plain)))
    plain = re.sub(r"([\u3400-\u9fff])([a-z])", r"\1 \2", plain)
    plain = _NUMBER.sub(" ", _one_space(_CHOICE.sub(" ", _one_space(_LONE_IN_BRACKETS.sub(r" \1 ", plain)))))
    options = dict(_OPTION.findall(plain))
    if set(options.values()) == {YES, NO}:  # "A. Yes B. No": the letter that is stated decides
        plain = _LETTER.sub(lambda m: f"{m[1]}{options.get(m[2], m[2])}", _OPTION.sub(" ", plain))
    return _one_space(plain).strip()


def _one_space(text: str) -> str:
    return re.sub(r"\n[ \n]*", "\n", re.sub(r"[^\S\n]+", " ", text))


def _translated(m: re.Match) -> str:
    stated = re.search(r"答|结|判断|结果", m["said"] or "")
    said = "final answer:" if m["final"] else "answer:" if stated else ""
    return f" {said} {NO if m['no'] else YES} "


# --- verdicts --------------------------------------------------------------------------------------------------

# "No" before any other word is a determiner ("no image", "no response"); before these a clause begins or goes on. "Yes"
# is held to the same rule, so that no frame reads one and not the other.
_CLAUSE_WORDS = frozenset(
    "i you he she it we they this that these those the a an both all each neither either my your his her its our their "  # noqa: SIM905
    "there here because since as for but and although though while however when so then due given based considering "
    "is are was were be do does did can could would will should might may has have had not in on at from by to with "
    "according within definitely absolutely certainly clearly actually indeed really obviously surely exactly probably "
    "unfortunately therefore thus hence sorry sir thanks please again too either yes no it's that's there's i'm they're".split()
)
_WORD = re.compile(rf"(?<![\w'-])({_ANY})(?![\w'])(?!-\w)")
_NEXT = re.compile(r"[ ]*([a-zà-ɏа-ё']+)?")
_IN_PART = frozenset(("in", "by", "for", "from", "with"))  # "yes in theory": no verdict of its own rank
_WINDOW = 200  # characters around a verdict that can bear on it
_SENTENCE = re.compile(r"[.!?;\n。](?!\d)")
_CLAUSE = re.compile(
    r"[.!?;,()\[\]{}。、—–…](?!\d)|\n|\s-\s|\b(?:(?<!anything )but|so|because|therefore|thus|hence|since|and|then|although|though|however|while)\b"
)
_STATED = re.compile(
    r"\b(?P<final>final\s+|ultimate\s+|overall\s+)?(?:answer|verdict|conclusion|response|judge?ment|choice|decision|reply|result"
    r"|prediction|determination|pick|vote)\b(?:\s+(?:to|for|of|here|given)\b[^.!?;:\n]{0,80}?)?"
    r"(?:\s+(?:is|was|would|should|must|will|be|remains|has|to))*[\s,:=>(\[{—–-]*(?:that\s+)?"
    r"(?:(?:a|an|definitely|clearly|simply|still|therefore|thus|hence|most|likely|probably|indeed|option)\s+)*"
    r"(?:\(?[a-d1-4]\s*[.):,]\s*\(?)?\s*$"
)
_NEGATED = re.compile(
    r"\b(?:not|never|neither|either|nor|hardly|scarcely|without|nothing|nobody|few\s+(?:would|will)|far from|no\s+\w+|instead of|"
    r"opposite|anything but|doubt|deny|reject|refuse|hesitate|unlikely|avoid|mistake|disagree|oppose|against|fails?|"
    r"exclud\w+|rul(?:e|es|ed|ing)\s+out|(?:wrong|incorrect|false|untrue|a\s+lie)\s+(?:answer|to|that)|if|whether|unless|suppos\w+|assum\w+|maybe|perhaps|possibly)\b"
    r"|\b(?:may|might|could)\s+(?:\w+\s+)?(?:be|say)(?:\s+(?:an?|that|either))?\s*$|\b(?:or|than|less|more|half|both)\s*$|[不没非别]|如果|可能|也许"
)
# What others say is not the reply's own verdict.
_OTHERS = re.compile(
    r"\b(?:he|she|they|you|who|people|persons?|some(?:one|body)?|others?|many|most|one|students?|signs?|texts?|words?|labels?|captions?|"
    r"buttons?|users?|man|woman)\b.{0,40}\b(?:sa(?:y|ys|id)|reads?|writes?|thinks?|thought|argues?|guess|assumes?|expects?|voted?|votes|"
    r"ask(?:s|ed)?|believes?|claims?)\b|\b(?:labell?ed|written)\b|\bword\s*$"
)
_SUBJECT = re.compile(r"\s*(?:is|was|would|can|could|does|did|seems|will|should|must|may|might)\b[^.!?;,\n]{0,80}")
_REJECTED = re.compile(
    r"\b(?:not|wrong|incorrect|false|untrue|never|inaccurate|mistake|error|a lie|excluded|eliminated|ruled out)\b"
)
# A verdict on a condition is half of one; "if we look closely" is no condition.
_IF = r"(?:(?<!even )if|unless|assuming|supposing|provided(?: that| it)|as long as)\s+(?!(?:we|you|i|one|forced|asked|so)\b)"
_ON_CONDITION = re.compile(rf"\s*,?\s*(?:but\s+)?(?:only\s+)?{_IF}")
_CONDITION = re.compile(rf"\s*(?:(?:and|but|so|only|well|however|although)\W+)*{_IF}")
# "Yes, but it's not" says both; "yes, but it's not red" does not.
_WITHDRAWN = re.compile(
    r"\s*[,.]?\s*(?:but|although|though|except|only)\s+(?:it|that|this|there|they|he|she|i)(?:'s|'re|\s+(?:is|are|was|were|does|do|did|has|can))"
    r"(?P<no>\s+not)?(?:\s+(?:really|actually|so|the case|true))?\s*(?:[.!;\n]|$)"
)
_ALONE = re.compile(
    r"\W*(?:(?:ok|okay|well|sure|right|hmm|um|oh|ah|i think|i believe|i would say|i'd say|definitely|my answer)\W+)*"
)
# A lower rank outranks: final answer, stated answer, a clause of its own, elsewhere.
_FINAL, _SAID, _HEAD, _LOOSE = range(4)

_SHORT = re.compile(  # as the complete reply
    r"\W*(?:(?P<no>(?:definitely|absolutely|certainly|surely|clearly|indeed)\s+not|not\s+(?:at\s+all|really)|i\s+do\s+not\s+"
    r"(?:think|believe)\s+so|i\s+(?:think|believe)\s+not)|definitely|absolutely|certainly|surely|indeed|i\s+(?:think|believe)\s+so)\W*"
)
_TRUTH = re.compile(
    r"(?:^\W*|[:=]\s*|\b(?:is|are|was|be|it's|that's|seems|looks)\s+)"
    r"(?P<no>(?:(?:not|never|hardly)\s+)?)(?:(?:entirely|completely|quite|totally|indeed|also|actually|factually)\s+)*"
    r"(?P<word>correct|true|right|accurate|the\s+case|incorrect|false|wrong|inaccurate|untrue)\b"
    r"(?!\s+(?:of|to|next|here|there|behind|beside|under|side|above|below|hand|angle|triangle|order|answers?|option|if)\b)"
    rf"(?!\s+that\b[^.!?\n]{{0,60}}\b(?:{_ANY})\b)"
)
_NEGATIVE = {"incorrect", "false", "wrong", "inaccurate", "untrue"}
_UNSURE = re.compile(
    r"\b(?:(?:can|could)\s+not|unable|impossible|unclear|unsure|uncertain|unknown|undetermined|indeterminate|insufficient|whether|depends|"
    r"not\s+(?:sure|certain|clear|possible|enough|know|given|provided|specified|shown|available)|hard\s+to|difficult\s+to)\b"
)
# A thing that the picture lacks is a no; a missing picture, context or means to tell is neither.
_LACKS = re.compile(
    r"^\W*there\s+(?:is|are|was|were)\s+no\s+(?P<what>[\w' -]{1,60}?)\s+(?:in|on|at|within)\s+(?:the|this)\s+"
    r"(?:given\s+|provided\s+)?(?:image|picture|photo|figure|diagram|chart|graph|map|table|scene|drawing|video)s?\s*[.!]?$"
    r"|^\W*no\s?one\s+(?:is|was)\s+there\s*[.!]?$"
)
_MEANS = re.compile(
    r"\b(?:information|data|evidence|indication|mention|details?|contexts?|clues?|hints?|proof|reference|reason|way|answers?|"
    r"questions?|images?|pictures?|photos?|figures?|descriptions?|sign|legend|caption|labels?|title|explanation|basis|doubt|content|"
    r"cues?|inputs?|visuals?|support|measurements?|annotations?|comparisons?|scale|response|point|truth|conclusion)\b"
)
# Who was shown nothing has answered nothing, whatever stands before it; a picture on the wall is another matter.
_THING = (
    r"(?:images?|pictures?|photos?|photographs?|figures?|files?|attachments?|contexts?|screenshots?|"
    r"visual\s+(?:content|information|input|data|context))"
)
_GIVEN = (
    r"(?:provided|given|attached|uploaded|supplied|included|shared|sent|received|available|accessible|visible)"
    r"(?!\s+(?:to|on|in|by|from)\s+(?:the|an?|his|her|its)\s+(?!message|prompt|question|request|query|conversation|input|chat))"
)
_END = (
    rf"(?=\s*(?:$|[.!,;\n]|{_GIVEN}\b|(?:here|there|you|and|so|but|because|to\s+(?:me|us|analy\w+|look|refer|see|view)|for\s+(?:me|us|reference)|"
    r"(?:in|with)\s+(?:your|the|this)\s+(?:message|prompt|question|request|query|conversation|input))\b))"
)
_UNSEEN = re.compile(
    rf"\bno[ ]+(?:(?:accompanying|attached|actual|such|given|provided|visible|relevant)\s+)?{_THING}"
    rf"(?:(?:\s+(?:is|are|was|were|has|have|been|can be))*\s+{_GIVEN}\b|{_END})"
    rf"|\b{_THING}\s+(?:is|are|was|were|has|have|did|does|could|can)\s+not\s+(?:been\s+|be\s+)?(?:\w+ly\s+)?"
    rf"(?:(?:provided|given|attached|uploaded|supplied)\b|(?:{_GIVEN}|load(?:ed|ing)?|displayed|shown|opened|seen|render(?:ed)?){_END})"
    rf"|\b{_THING}\s+(?:is|was|are|seems\s+to\s+be|appears\s+to\s+be)\s+(?:missing|blank|empty|absent|unavailable|inaccessible){_END}"
    rf"|\b{_THING}\s+fail(?:s|ed)\s+to\b"
    rf"|\b(?:(?:can|could|do|does|did|have|has|am|are)\s+not|unable\s+to)\s+(?:(?:been\s+)?able\s+to\s+|\w+ly\s+)?"
    rf"(?:see|view|access|open|load|receive|have|find|provide|include|attach|upload|share|send|process|analy[sz]e)d?\s+"
    rf"(?:access\s+to\s+)?(?:(?:an?|any|the|your|this|that)\s+)?{_THING}{_END}"
    rf"|\bwithout\s+(?:(?:seeing|viewing|having|access\s+to|an?|any|the|your|this)\s+)+{_THING}\b(?!\s+o[fn]\b)"
    rf"|\b(?:was|were|am|have)\s+not\s+(?:been\s+)?(?:given|shown|provided(?:\s+with)?|sent)\s+(?:an?|any|the)\s+{_THING}\b"
    r"|\bcan\s+not\s+(?:help|assist|comply)\b"
    r"|(?:没有?|未)(?:看到|收到|见到|提供|上传|附上?|加载)?(?:任何)?(?:图片?|图像|照片)(?=\W|$|可|提供)|(?:看|见|查看|打)不(?:到|见|了|开)(?:任何)?(?:图|照片)"
    r"|(?:图片?|图像|照片)(?:没有?|未)(?:被)?(?:提供|上传|加载|显示)"
)


def read_yes_no(text: str) -> str | None:
    """`yes`, `no`, or None when the reply is unreadable, open or contradicts itself.

    The text inside the last `<answer>` is read where there is one, reasoning never. "Yes" and "no" count where they stand
    alone as a verdict, by one rule for both; negated, asked or supposed ones do not count. A final answer ("Final
    answer: ...", a box) outranks a stated one ("the answer is ..."), that outranks a clause that is only yes or no, and
    that "correct", "not correct" and a yes or no elsewhere. Verdicts of the deciding rank must agree.
    """
    plain = _plain(text)
    if _contradicted(plain):
        return None
    found: list[set[str]] = [set(), set(), set(), set()]  # by rank
    for rank, verdict, _ in _verdicts(plain):
        found[rank].add(verdict)
    if _PAIRED.search(plain):
        found[_HEAD] |= {YES, NO}
    found[_LOOSE] |= _truths(plain)
    if short := _SHORT.fullmatch(plain):
        found[_LOOSE].add(NO if short["no"] else YES)
    if (lacks := _LACKS.search(plain)) and not _MEANS.search(lacks["what"] or ""):
        found[_LOOSE].add(NO)
    if _UNSURE.search(plain):
        del found[_LOOSE:]
    if _UNSEEN.search(plain) or _withdrawn(plain):
        del found[_HEAD:]
    deciding = next(filter(None, found), set())
    return deciding.pop() if len(deciding) == 1 else None


def _verdicts(plain: str) -> Iterable[tuple[int, str, int]]:
    """(rank, yes or no, where what states it begins) of every stand-alone verdict."""
    for m in _WORD.finditer(plain):
        if _ON_CONDITION.match(plain, m.end()):
            continue
        following = _NEXT.match(plain, m.end())[1]  # type: ignore[index]  # it matches the empty string too
        if following and following not in _CLAUSE_WORDS:  # "if" and "or" are none: no verdict, but half of one
            continue
        start = max(0, m.start() - _WINDOW)
        before = plain[start : m.start()]
        if _asked(plain, m):
            continue
        clause = _CLAUSE.split(before)[-1]
        if "," in before and _CONDITION.match(_SENTENCE.split(before)[-1]):
            continue
        subject = _SUBJECT.match(plain, m.end())
        if _NEGATED.search(clause) or _OTHERS.search(clause) or (subject and _REJECTED.search(subject.group())):
            continue
        opens = start == 0 and following not in _IN_PART and _ALONE.fullmatch(before)
        if stated := _STATED.search(before):
            yield (_FINAL if stated["final"] else _SAID), _AS[m[1]], start + stated.start()
        elif opens or (_ALONE.fullmatch(clause) and not following):
            yield _HEAD, _AS[m[1]], m.start()
        else:
            yield _LOOSE, _AS[m[1]], m.start()


def _asked(plain: str, m: re.Match) -> bool:
    end = _SENTENCE.search(plain, m.end(), m.end() + _WINDOW)
    return end is not None and end.group() == "?"


def _withdrawn(plain: str) -> bool:
    """Whether a verdict is taken back at once: then only a stated answer counts."""
    after = ((m, _WITHDRAWN.match(plain, m.end())) for m in _WORD.finditer(plain))
    return any(taken and (_AS[m[1]] == YES) == bool(taken["no"]) for m, taken in after)


def _contradicted(plain: str) -> bool:
    """Whether the reply opens with a verdict and states the other one at once: nothing was thought over in between."""
    first = _WORD.match(plain, re.match(r"\W*", plain).end())  # type: ignore[union-attr]
    if not first:
        return False
    for rank, verdict, start in _verdicts(plain[: first.end() + 2 * _WINDOW]):
        if rank == _SAID and verdict != _AS[first[1]]:
            return not re.search(r"\w", re.sub(r"\b(?:the|my|so|but)\b", "", plain[first.end() : start]))
    return False


def _truths(plain: str) -> set[str]:
    """What "correct", "not true" and the like say; negated from afar, asked or supposed they say nothing."""
    found = set()
    for m in _TRUTH.finditer(plain):
        clause = _CLAUSE.split(plain[max(0, m.start() - _WINDOW) : m.start()])[-1]
        if not _asked(plain, m) and not _NEGATED.search(clause) and not _WORD.search(clause):
            found.add(NO if (m["word"] in _NEGATIVE) != bool(m["no"].strip()) else YES)
    return found


# --- another toolkit's rule ------------------------------------------------------------------------------------


def read_vlmevalkit(text: str) -> str | None:
    """VLMEvalKit's rule (YOrN_Extraction), so that figures published with it can be matched: is `yes` or `no` a word?

    Exactly one of the two must be among the words of the lower-case reply, reasoning and tags included. Before the split,
    each mark becomes a space, or nothing if it stands beside a space anywhere in the reply or if the reply has a number
    like 1,000; the first 32 full stops that no digit follows vanish.
    """
    reply = plain = text.lower()
    thousands = re.search(r"\d,\d", reply) is not None
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        joins = thousands or f"{mark} " in reply or f" {mark}" in reply
        plain = plain.replace(mark, "" if joins else " ")
    said = {YES, NO} & set(re.sub(r"\.(?!\d)", "", plain, count=32).split())
    return said.pop() if len(said) == 1 else None


_SILENT = re.compile(r"</?[a-zA-Z][^<>]{0,40}>|<\|[^<>|]{1,40}\|>|\s")

READERS = {"r1v": read_yes_no, "vlmevalkit": read_vlmevalkit}


def judged_text(reply: str, judge_input: str, reader: str = "r1v") -> str | None:
    """What a judge is shown: the complete reply, or its answer (in tags; where there are none all but its reasoning).

    None when nothing is said outside the reasoning, whichever is asked for: that is no answer to judge. VLMEvalKit's rule
    reads reasoning too.
    """
    if reader == "vlmevalkit":
        return reply if reply.strip() else None
    answer = parse(reply).answer
    said = without_thinking(reply) if answer is None else answer
    if not _SILENT.sub("", said):
        return None
    return reply if judge_input == "reply" else said
