"""Cleaning, judging and the language check: pure functions of a text."""

from __future__ import annotations

import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from ollama_server import story

from mamba2_min.datagen.cleaning import clean, clean_request
from mamba2_min.datagen.judging import Rules, judge, words
from mamba2_min.datagen.languages import LANGUAGES, is_written_in
from mamba2_min.errors import printable

STORY = story(1)


@pytest.mark.parametrize(
    "raw",
    [
        f"<think>\nA fox? Yes.\n</think>\n\n{STORY}",
        f"A fox? Yes.\n</think>\n{STORY}",
        f"<thinking>hm</thinking><think>hm</think> {STORY}",
        f"Sure! Here's a short story about a fox:\n\n{STORY}",
        f"Sure!\n\n{STORY}",
        f"Certainly, here is the story you asked for.\n\n{STORY}",
        f"Here is a story of about 200 words: {STORY}",
        f"Here's my attempt:\n\n{STORY}",
        f"I'd be happy to write that for you!\n\n{STORY}",
        f"Hier ist eine kurze Geschichte:\n\n{STORY}",
        f"**The Fox and the Well**\n\n{STORY}",
        f"# The Fox\n\n{STORY}",
        f"Title: The Fox\n\n{STORY}",
        f"**Title:** The Fox\n---\n{STORY}",
        f"Of course! Here is a story:\n\n**The Fox**\n\n---\n\n{STORY}\n\n---\n\nLet me know if you'd like changes!",
        f"{STORY}\n\n(Word count: 212)",
        f"{STORY}\n\nWord count: 212 words",
        f"{STORY}\n\n*212 words*",
        f"{STORY}\n\nWould you like me to write another one?",
        f"{STORY}\n\nI hope you enjoyed this story! It was fun to write.",
        f"{STORY}\n\n**The End**",
        f"{STORY}\n<end>",
        f"<start>{STORY}<end><|im_end|></s>",
        f"{STORY}<|eot_id|>",
        f"```markdown\n{STORY}\n```",
        STORY.replace("\n", "\r\n"),
        f"  \n{STORY}   \n\n",
        STORY.replace("\n\n", "\n \t\n\n\n"),
        f"\x1b[31m{STORY[:9]}\x1b[0m{STORY[9:]}\x00\x07\x9b\u202e\ufeff",
        f"\x1b]0;title\x07{STORY}\u200b",
    ],
)
def test_what_was_not_asked_for_is_taken_off(raw):
    assert clean(raw) == STORY


T = f"I could write of a fox. {story('thought')}"
THOUGHTS = [
    "<think>{t}</think>",
    "<THINK>{t}</THINK>",
    "<think>{t}<think>{t}</think>{t}</think>",
    "{t}</think>",
    "<thinking>{t}</thinking><reflection>{t}</reflection>",
    "<seed:think>{t}</seed:think>",
    "<seed:think>{t}<seed:cot_budget_reflect>{t}</seed:cot_budget_reflect>{t}</seed:think>",
    "<longcat_think>{t}</longcat_think>",
    "< think >{t}</ think >",
    "<think >{t}</think >",
    "<reasoning_content>{t}</reasoning_content>",
    "<antThinking>{t}</antThinking>",
    "<internal_monologue>{t}</internal_monologue>",
    "[THINK]{t}[/THINK]",
    "{t}[/THINK]",
    "◁think▷{t}◁/think▷",
    "<|think|>{t}<|/think|>",
    "<|begin_of_thought|>{t}<|end_of_thought|>\n\n<|begin_of_solution|>",
    "<|START_THINKING|>{t}<|END_THINKING|><|START_RESPONSE|>",
    "<unused94>thought\n{t}<unused95>",
    "<|channel>thought\n{t}<channel|>",
    "<|channel|>analysis<|message|>{t}<|end|><|start|>assistant<|channel|>final<|message|>",
    "<|start|>assistant<|channel|>analysis<|message|>{t}<|end|><|start|>assistant<|channel|>commentary<|message|>{t}"
    "<|end|><|start|>assistant<|channel|>final<|message|>",
    "analysis{t}assistantfinal",
    "Here is my thought process:\n{t}\n\nHere is my response:\n",
    "<reasoning>{t}</reasoning><answer>",
]


@pytest.mark.parametrize("form", THOUGHTS)
def test_thoughts_are_taken_off(form):
    assert clean(form.format(t=T) + "\n" + STORY) == STORY
    for end in ("<|end|>", "<|return|>", "</answer>", "<|END_RESPONSE|>"):
        assert clean(form.format(t=T) + STORY + end) == STORY


@pytest.mark.parametrize("form", [form for form in THOUGHTS if not form.startswith("{t}")])
def test_a_thought_without_an_end_is_no_text(form):
    opening = form.partition("{t}")[0]
    assert judge(clean(opening + T), Rules()) == "empty"
    if opening[0] in "<[◁":  # a mark, and not words that a text may well contain
        assert judge(clean(STORY + "\n" + opening + T), Rules()) in ("empty", "markers in the text")


@pytest.mark.parametrize(
    "text",
    [
        "[thinking] I do not know, said Anna.",
        "He wrote: I think; therefore I am.",
        "An analysis of the soil showed nothing.",
        "Her channel of thought ran dry.",
    ],
)
def test_what_only_sounds_like_a_thought_stays(text):
    assert clean(text) == text


@pytest.mark.parametrize(
    "text",
    [
        '"Sure," said the fox, "here is a story about a hen: listen."',
        "Here is where the road ends. Nobody goes on from here, whatever the map says.",
        "Sure of foot, the goat climbed on.",
        "Of course the well was dry. It had been dry for years.",
        "This is the story of how I lost my hat.\n\nIt was a green hat.",
        "**ANNA:** Where is it?\n**BEN:** Gone.",
        "**Anna:**\nWhere is it?",
        "Great waves broke over the pier.",
        "Dear Anna,\n\nLet me know if you come on Sunday.\n\nYours, Ben",
        "He had three words for rain.\n\nThe end of the road was far.",
        "a < b and b > c, so 3 < 4",
        "I would be happy to see you, wrote Ben.",
        "¿Dónde está? — Aquí. 日本語 ünïcödé 👩‍👩‍👧 naïve",
    ],
)
def test_what_belongs_to_a_text_stays(text):
    assert clean(text) == text


@given(st.text(st.characters(codec=None), max_size=300))
@example("\x1b" * 3 + "[31m<think></think>")
@example("<end> <start>")
def test_nothing_unprintable_is_left_and_cleaning_again_changes_nothing(raw):
    text = clean(raw)
    assert printable(text, keep="\n\t") == text
    assert text == text.strip()
    assert clean(text) == text
    text.encode("utf-8")


@pytest.mark.parametrize(
    "unit",
    [
        " ",
        "\n",
        "<",
        "< ",
        "<think>",
        "</think>",
        "<end> ",
        "---\n",
        "*",
        "**a**\n",
        "Sure! ",
        "Here is ",
        "\x1b[",
        "\x1b]",
        "word count ",
        "would you like me to ",
        "[THINK]",
        "<|channel|>analysis",
        "<|channel|>",
        "<think>[THINK]◁think▷<unused94>",
        "a\u0301\u200d",
        "\u202e",
        "I can't ",
        "as an ",
        "```\n",
        "Title: ",
    ],
)
def test_no_text_takes_long(unit):
    """Patterns that try every way to share out a long run would take minutes."""
    for raw in (unit * (60_000 // len(unit)), "a\n" + unit + " " * 60_000 + "b\n" + unit, "x" * 60_000 + unit * 100):
        begun = time.process_time()
        judge(clean(raw) + unit, Rules(language="en"))
        assert time.process_time() - begun < 3


@pytest.mark.parametrize(
    "raw",
    [
        "Write about a fox.",
        '"Write about a fox."',
        "“Write about a fox.”",
        "Request: Write about a fox.",
        "**Request:** Write about\na fox.",
        "Sure! Here's the request:\n\nWrite about a fox.",
    ],
)
def test_a_request_is_one_bare_paragraph(raw):
    assert clean_request(raw) == "Write about a fox."


def test_quotes_within_a_request_stay():
    assert clean_request('"Fox" or "wolf"') == '"Fox" or "wolf"'


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (STORY, None),
        ("", "empty"),
        ("The fox slept.", "too short"),
        (STORY + " fox" * 3000, "too long"),
        ("I'm sorry, but I can't assist with that request. " + STORY, "refusal"),
        ("I cannot create content that depicts violence. " + STORY, "refusal"),
        ("I am unable to write a story about this topic. " + STORY, "refusal"),
        ("Sorry, I can’t help with that. " + STORY, "refusal"),
        (STORY + " As an AI language model, I have no feelings.", "refusal"),
        (STORY + " But I'm just an AI, so I cannot know.", "refusal"),
        ("I can't help smiling when I think of it. " + STORY, None),
        ("I can't write a long letter today, dear Anna. " + STORY, None),
        ("I'm sorry, but I can't go with you, said the fox. " + STORY, None),
        ("Sorry, we cannot continue on foot, said the guide. " + STORY, None),
        ("I had her as an aide for years. " + STORY, None),
        (STORY.replace("\n\n", " <end> "), "markers in the text"),
        (STORY.replace("\n\n", "<|endoftext|>"), "markers in the text"),
        (STORY.replace("fox", "f\ufffdx").replace("the", "th\ufffd", 1), "broken characters"),
        ("I see. " * 100, "goes round in circles"),
    ],
)
def test_judgement(text, reason):
    assert judge(text, Rules()) == reason


def test_words_of_scripts_without_spaces_are_counted_by_character():
    assert words("Don't STOP — o’clock, 3.5 km_h") == ["don't", "stop", "o’clock", "3", "5", "km", "h"]
    assert len(words("昔々あるところに")) == 8
    assert judge("昔々、あるところにおじいさんとおばあさんが住んでいました。", Rules()) is None


SAMPLES = {
    "en": "When the rain stopped, the old man took his hat from the wall and went out to look at the river, which "
    "had risen in the night and now stood at the door of the mill.",
    "de": "Als der Regen aufhörte, nahm der alte Mann seinen Hut von der Wand und ging hinaus, um nach dem Fluss zu"
    " sehen, der in der Nacht gestiegen war und nun vor der Tür der Mühle stand.",
    "fr": "Quand la pluie cessa, le vieil homme prit son chapeau au mur et sortit pour regarder la rivière, qui "
    "avait monté dans la nuit et se tenait maintenant devant la porte du moulin.",
    "es": "Cuando dejó de llover, el viejo tomó su sombrero de la pared y salió a mirar el río, que había crecido "
    "en la noche y ahora estaba ante la puerta del molino.",
    "it": "Quando la pioggia smise, il vecchio prese il cappello dal muro e uscì a guardare il fiume, che era "
    "cresciuto nella notte e ora stava davanti alla porta del mulino.",
    "pt": "Quando a chuva parou, o velho pegou o seu chapéu da parede e saiu para olhar o rio, que tinha subido "
    "durante a noite e agora estava diante da porta do moinho.",
    "nl": "Toen de regen ophield, nam de oude man zijn hoed van de muur en ging naar buiten om naar de rivier te "
    "kijken, die in de nacht gestegen was en nu voor de deur van de molen stond.",
    "sv": "När regnet slutade tog den gamle mannen sin hatt från väggen och gick ut för att se på floden, som hade "
    "stigit under natten och nu stod vid kvarnens dörr.",
    "pl": "Kiedy deszcz ustał, stary człowiek zdjął kapelusz ze ściany i wyszedł popatrzeć na rzekę, która w nocy "
    "wezbrała i teraz stała już przed drzwiami młyna, a on nie wiedział, co robić.",
    "cs": "Když přestalo pršet, starý muž si vzal klobouk ze zdi a vyšel ven podívat se na řeku, která se v noci "
    "zvedla a teď už stála u dveří mlýna, a on nevěděl, co má dělat.",
    "tr": "Yağmur dinince yaşlı adam şapkasını duvardan aldı ve geceleyin yükselmiş olan nehre bakmak için dışarı "
    "çıktı; su artık değirmenin kapısına kadar gelmişti ve o ne yapacağını bilmiyordu.",
    "ru": "Когда дождь кончился, старик снял шляпу со стены и вышел посмотреть на реку, которая ночью поднялась и "
    "теперь стояла у самой двери мельницы, и он не знал, что делать.",
    "uk": "Коли дощ скінчився, старий зняв капелюха зі стіни й вийшов подивитися на річку, яка вночі піднялася і "
    "тепер стояла біля самих дверей млина, і він не знав, що робити.",
    "el": "Όταν σταμάτησε η βροχή, ο γέρος πήρε το καπέλο του από τον τοίχο και βγήκε να δει το ποτάμι.",
    "he": "כשהגשם פסק, לקח הזקן את כובעו מן הקיר ויצא להביט בנהר שעלה בלילה.",
    "ar": "عندما توقف المطر، أخذ الرجل العجوز قبعته عن الحائط وخرج لينظر إلى النهر.",
    "hi": "जब बारिश रुकी, बूढ़े आदमी ने दीवार से अपनी टोपी उतारी और नदी देखने बाहर गया।",
    "th": "เมื่อฝนหยุด ชายชราหยิบหมวกจากผนังแล้วออกไปดูแม่น้ำที่เอ่อขึ้นในตอนกลางคืน",
    "ko": "비가 그치자 노인은 벽에서 모자를 집어 들고 밤새 불어난 강을 보러 나갔다.",
    "ja": "雨がやむと、老人は壁から帽子を取り、夜のうちに水かさの増した川を見に出かけた。",
    "zh": "雨停了，老人从墙上取下帽子，走出门去看夜里涨起来的河水。",
}


def test_every_language_has_a_sample():
    assert SAMPLES.keys() == LANGUAGES.keys()


@pytest.mark.parametrize("code", LANGUAGES)
def test_a_language_is_told_from_all_others(code):
    assert [other for other in LANGUAGES if is_written_in(SAMPLES[code], other)] == [code]


def test_a_text_that_falls_into_another_language_is_noticed():
    assert judge(SAMPLES["en"] + SAMPLES["zh"] * 3, Rules(language="en")) == "wrong language"
    assert judge(SAMPLES["en"], Rules(language="de")) == "wrong language"
    assert judge(SAMPLES["en"] + " “Guten Tag,” she said.", Rules(language="en")) is None
