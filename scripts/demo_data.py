"""Writes the data sets of the cofitune demo: one speciality plus small general measures.

Everything here was composed for the demo; nothing is copied from an existing data set. The script needs the standard
library only and writes the same bytes for the same seed, so a run of the demo can be repeated exactly.

Files, all UTF-8 JSON Lines:

* ``ledger_train`` / ``ledger_dev`` / ``ledger_test``: the speciality. Fields ``instruction``, ``input``, ``output``: a
  free-text expense note becomes one line ``MM-DD|CATEGORY|AMOUNT|CURRENCY`` that exact match can check.
* ``gen_kn`` / ``gen_kn_dev`` (general knowledge) and ``gen_rs`` / ``gen_rs_dev`` (general reasoning): multiple choice
  with the fields ``question``, ``choices`` (four strings) and ``answer`` (0-based index).
* ``instruct`` / ``instruct_dev``: instruction following in IFEval's format, fields ``key``, ``prompt``,
  ``instruction_id_list`` and ``kwargs``.
* ``instruct_other``: more of the same, in other words, about other things and with further kinds of instructions, so
  that no prompt of ``general_prompts`` resembles one of them.
* ``general_train``: short helpful conversations, field ``messages``, for measuring the importance of units.
* ``general_prompts``: field ``prompt``. The base model answers these itself (``cofitune rehearse``), and its answers
  are trained beside the speciality. Every beginning of the file is a balanced mixture.

The ``*_dev`` files serve the search (choosing a region, a learning rate); they share no item with the test files, so
that no choice is ever made by looking at a test item.

Usage: ``python scripts/demo_data.py --to DIR [--seed 1234]``
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import demo_prompts

Item = dict[str, Any]

LEDGER_TRAIN = 1200
LEDGER_DEV = 64
LEDGER_TEST = 160

# --------------------------------------------------------------------------------------------------------------------
# The speciality: expense note -> ledger line
# --------------------------------------------------------------------------------------------------------------------

LEDGER_INSTRUCTION = "Ledger line:"

MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)

#: Currency code -> ways to write an amount in it.
CURRENCIES: dict[str, tuple[str, ...]] = {
    "EUR": ("{} euros", "€{}", "EUR {}", "{} EUR"),
    "USD": ("{} dollars", "${}", "USD {}", "{} USD"),
    "GBP": ("{} pounds", "£{}", "GBP {}", "{} GBP"),
    "CHF": ("{} Swiss francs", "CHF {}", "{} CHF"),
    "SEK": ("{} Swedish kronor", "SEK {}", "{} SEK"),
}

#: Category -> things bought. The last one of each category appears in no training note.
CATEGORIES: dict[str, tuple[str, ...]] = {
    "MEALS": ("lunch", "dinner", "breakfast", "coffee", "a pizza", "sandwiches", "a team dinner", "a team lunch"),
    "TRAVEL": ("a taxi", "a train ticket", "a flight", "a bus ticket", "parking", "a rental car", "a taxi ride"),
    "LODGING": ("a hotel", "a hotel room", "a hostel", "a guest house", "a motel", "an inn", "a hotel night"),
    "OFFICE": ("pens", "paper", "a desk lamp", "a stapler", "notebooks", "a desk", "an office chair", "printer paper"),
    "SOFTWARE": ("an app", "a software licence", "cloud storage", "an antivirus", "a web domain", "a software update"),
    "POSTAGE": ("stamps", "a parcel", "a courier", "express mail", "postcards", "a letter", "airmail stamps"),
    "TRAINING": ("a course", "a workshop", "a seminar", "a class", "a textbook", "a webinar", "a first aid course"),
}

#: People and payees; the test notes use the second group only.
NAMES_TRAIN = (
    *("Sara", "Tom", "Priya", "Jonas", "Mei", "Luca", "Anna", "Omar", "Elena", "David", "Ruth", "Ivan", "Grace"),
    *("Peter", "Nina", "Carlos", "Helen", "Felix", "Amy", "Mark"),
)
NAMES_TEST = ("Laura", "Simon", "Maria", "Henry", "Olga", "Paul", "Alice", "Diego")
PAYEES_TRAIN = (
    *("Nordvik", "Halden", "Brightway", "Ortega & Co", "Bluebird", "Kestrel", "Maple Row", "Sundial", "Castellan"),
    *("Westgate", "Ironbridge", "Lakeside", "Parkview", "Redwood", "Tern & Sons", "Oakfield"),
)
PAYEES_TEST = ("Silverline", "Harbour", "Greenhill", "Marlow & Sons", "Eastgate", "Fairfield")

LEDGER_TEMPLATES = (
    "Paid {amount} for {thing} with {name} on {date}",
    "{date}: {thing} from {payee}, {amount}",
    "On {date} {name} spent {amount} on {thing}",
    "{name} paid {payee} {amount} for {thing} on {date}",
    "Receipt from {payee}: {thing}, {amount}, {date}",
    "I bought {thing} for {amount} on {date}",
    "{amount} to {payee} on {date} for {thing}",
    "{payee} charged us {amount} for {thing} on {date}",
    "Please book {amount} for {thing}, {date}, {name}",
    "{thing}, {date}, {amount}, paid by {name}",
    "{name} and I paid for {thing} on {date}, total {amount}",
    "For {thing} on {date} we owe {name} {amount}",
)

DATE_FORMATS = ("{d} {month}", "{month} {d}", "{d} {mon}", "{mon} {d}", "the {o} of {month}", "{month} {o}")


def _ordinal(day: int) -> str:
    """The English ordinal of a day of the month, such as ``3rd``."""
    suffix = "th" if 10 <= day % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
    return f"{day}{suffix}"


def _amount_text(cents: int, rng: random.Random) -> str:
    """One way a person would write the amount: ``23.50``, ``23,50`` or, for whole amounts, ``23``."""
    whole, part = divmod(cents, 100)
    if part == 0:
        return str(whole)
    return f"{whole},{part:02d}" if rng.random() < 0.2 else f"{whole}.{part:02d}"


def _ledger_item(rng: random.Random, *, held_out: bool) -> Item:
    """One expense note with its ledger line.

    Args:
        rng: The source of every choice.
        held_out: Take the people and payees kept for the test, and now and then a thing that training never shows.
    """
    category = rng.choice(tuple(CATEGORIES))
    things = CATEGORIES[category]
    thing = things[-1] if held_out and rng.random() < 0.15 else rng.choice(things[:-1])
    month, day = rng.randint(1, 12), rng.randint(1, 28)
    cents = rng.randint(3, 480) * 100 if rng.random() < 0.3 else rng.randint(300, 48000)
    currency = rng.choice(tuple(CURRENCIES))
    name = MONTHS[month - 1]
    date = rng.choice(DATE_FORMATS).format(d=day, o=_ordinal(day), month=name, mon=name[:3])
    note = rng.choice(LEDGER_TEMPLATES).format(
        amount=rng.choice(CURRENCIES[currency]).format(_amount_text(cents, rng)),
        thing=thing,
        name=rng.choice(NAMES_TEST if held_out else NAMES_TRAIN),
        payee=rng.choice(PAYEES_TEST if held_out else PAYEES_TRAIN),
        date=date,
    )
    line = f"{month:02d}-{day:02d}|{category}|{cents // 100}.{cents % 100:02d}|{currency}"
    return {"instruction": LEDGER_INSTRUCTION, "input": note[0].upper() + note[1:], "output": line}


def _ledger(rng: random.Random, count: int, seen: set[str], *, held_out: bool) -> list[Item]:
    """``count`` ledger items whose inputs are not in ``seen``; their inputs are added to it."""
    items: list[Item] = []
    while len(items) < count:
        item = _ledger_item(rng, held_out=held_out)
        if item["input"] not in seen:
            seen.add(item["input"])
            items.append(item)
    return items


# --------------------------------------------------------------------------------------------------------------------
# General knowledge and general reasoning: question | right answer | three wrong ones
# --------------------------------------------------------------------------------------------------------------------

# Every third line goes to the dev file, so both files see every theme and every class of difficulty.
KNOWLEDGE = """
What is the capital of France? | Paris | London | Rome | Madrid
What is the capital of Japan? | Tokyo | Beijing | Seoul | Bangkok
What is the capital of Italy? | Rome | Athens | Vienna | Lisbon
What is the capital of Egypt? | Cairo | Nairobi | Baghdad | Tripoli
What is the capital of Spain? | Madrid | Lisbon | Paris | Rome
What is the capital of Germany? | Berlin | Vienna | Warsaw | Prague
What is the capital of Russia? | Moscow | Kiev | Warsaw | Minsk
What is the capital of Greece? | Athens | Rome | Sofia | Cairo
What is the capital of Portugal? | Lisbon | Madrid | Dublin | Rome
What is the capital of Norway? | Oslo | Stockholm | Helsinki | Copenhagen
What is the capital of Kenya? | Nairobi | Lagos | Cairo | Accra
What is the capital of Peru? | Lima | Quito | Bogota | Santiago
What is the capital of Cuba? | Havana | Lima | Madrid | Caracas
What is the capital of Austria? | Vienna | Berlin | Zurich | Prague
What is the capital of Ireland? | Dublin | Belfast | Cardiff | London
What is the capital of Poland? | Warsaw | Prague | Budapest | Berlin
What is the capital of Thailand? | Bangkok | Hanoi | Manila | Jakarta
What is the capital of Iran? | Tehran | Baghdad | Kabul | Damascus
Which metal is liquid at room temperature? | Mercury | Iron | Copper | Silver
Which gas do humans need to breathe in to stay alive? | Oxygen | Helium | Methane | Neon
Which gas do plants take in from the air to make food? | Carbon dioxide | Helium | Hydrogen | Neon
Which chemical element has the symbol Fe? | Iron | Tin | Lead | Zinc
Which chemical element has the symbol Au? | Gold | Silver | Copper | Zinc
Which chemical element has the symbol Na? | Sodium | Nitrogen | Nickel | Neon
Which chemical element has the symbol O? | Oxygen | Gold | Osmium | Iron
Which chemical element has the symbol Ag? | Silver | Gold | Argon | Aluminum
Which element is the lightest of all? | Hydrogen | Oxygen | Carbon | Iron
Which element are diamonds made of? | Carbon | Silicon | Calcium | Iron
Which two elements make up water? | Hydrogen and oxygen | Carbon and oxygen | Hydrogen and nitrogen | Carbon and iron
What is the chemical name of table salt? | Sodium chloride | Calcium carbonate | Carbon dioxide | Hydrogen peroxide
Which gas makes up most of the air around us? | Nitrogen | Oxygen | Helium | Methane
Which metal do magnets attract most strongly? | Iron | Gold | Copper | Aluminum
Which planet is closest to the Sun? | Mercury | Venus | Earth | Mars
Which planet is the largest in the solar system? | Jupiter | Saturn | Earth | Neptune
Which planet is known as the Red Planet? | Mars | Venus | Jupiter | Saturn
Which planet is famous for its large bright rings? | Saturn | Mars | Venus | Mercury
What is the star at the centre of our solar system? | The Sun | The Moon | The Earth | The North Star
What goes around the Earth about once a month? | The Moon | The Sun | Mars | Saturn
What force pulls objects towards the ground? | Gravity | Friction | Electricity | Magnetism
What is the name of our galaxy? | The Milky Way | Andromeda | Orion | The Big Dipper
What do we call a scientist who studies stars and planets? | An astronomer | A biologist | A chemist | A geologist
What do we call a scientist who studies rocks? | A geologist | A biologist | A botanist | An astronomer
What do we call a scientist who studies plants? | A botanist | A geologist | A physicist | An astronomer
What do we call a doctor for animals? | A veterinarian | A dentist | A surgeon | A pharmacist
What do we call a doctor who takes care of teeth? | A dentist | A surgeon | A nurse | A psychologist
Which organ pumps blood through the body? | The heart | The liver | The lungs | The stomach
Which organ do people use to think? | The brain | The heart | The liver | The stomach
Which organs take oxygen from the air we breathe? | The lungs | The kidneys | The eyes | The bones
Which organ do we see with? | The eye | The ear | The nose | The tongue
Which organ digests food? | The stomach | The heart | The brain | The lungs
Which organs filter waste from the blood and make urine? | The kidneys | The lungs | The ears | The muscles
What is the largest organ of the human body? | The skin | The heart | The liver | The brain
What do red blood cells carry around the body? | Oxygen | Sugar | Salt | Sound
What protects the brain from injury? | The skull | The spine | The ribs | The hair
Which vitamin does the skin make in sunlight? | Vitamin D | Vitamin C | Vitamin A | Vitamin K
Which fruit is well known for being rich in vitamin C? | Oranges | Coconuts | Dates | Olives
Which part of a plant takes up water from the soil? | The roots | The leaves | The flowers | The fruit
Which part of a plant makes most of its food? | The leaves | The roots | The bark | The seeds
What do bees make? | Honey | Milk | Silk | Wool
What do cows give that people drink? | Milk | Honey | Tea | Wine
Which animal gives us wool? | Sheep | Pigs | Ducks | Dogs
Which insect turns from a caterpillar into a flying adult? | Butterfly | Ant | Spider | Grasshopper
What is a young dog called? | A puppy | A kitten | A calf | A foal
What is a young cat called? | A kitten | A puppy | A lamb | A chick
What is a young cow called? | A calf | A foal | A lamb | A puppy
What is a young frog called? | A tadpole | A kitten | A chick | A calf
Which is the largest animal on Earth? | The blue whale | The elephant | The giraffe | The hippopotamus
Which is the tallest living land animal? | The giraffe | The elephant | The horse | The camel
Which is the fastest land animal? | The cheetah | The lion | The horse | The elephant
Which bird cannot fly but swims very well? | The penguin | The eagle | The parrot | The owl
Which animal is known for its long trunk? | The elephant | The lion | The tiger | The horse
Which animal carries its young in a pouch? | The kangaroo | The horse | The elephant | The rabbit
What do pandas mainly eat? | Bamboo | Fish | Insects | Grass
What kind of animal is a salmon? | A fish | A bird | A reptile | An insect
What kind of animal is an eagle? | A bird | A fish | A reptile | A mammal
What kind of animal is a whale? | A mammal | A fish | A reptile | A bird
What kind of animal is a crocodile? | A reptile | A mammal | A bird | A fish
What kind of animal is a frog? | An amphibian | A mammal | A bird | A fish
What kind of animal is an ant? | An insect | A reptile | A fish | A bird
How many legs does a spider have? | Eight | Six | Four | Ten
How many legs does an insect have? | Six | Eight | Four | Ten
What do caterpillars mostly eat? | Leaves | Meat | Fish | Stones
Which is the largest ocean on Earth? | The Pacific Ocean | The Atlantic Ocean | The Indian Ocean | The Arctic Ocean
Which is the highest mountain on Earth? | Mount Everest | Mount Fuji | Mont Blanc | Kilimanjaro
On which continent is Brazil? | South America | Europe | Africa | Asia
On which continent is India? | Asia | Europe | Africa | South America
On which continent is Nigeria? | Africa | Asia | Europe | North America
On which continent is Canada? | North America | South America | Europe | Africa
On which continent is Sweden? | Europe | Asia | Africa | South America
On which continent is China? | Asia | Europe | Africa | South America
Which continent is covered almost entirely by ice? | Antarctica | Africa | Europe | Asia
Which desert covers much of North Africa? | The Sahara | The Gobi | The Kalahari | The Mojave
Which river flows through Egypt? | The Nile | The Amazon | The Thames | The Danube
Which river flows through London? | The Thames | The Nile | The Rhine | The Seine
In which country is the Eiffel Tower? | France | Italy | Germany | Spain
In which country is the Great Wall? | China | Japan | India | Egypt
In which country are the pyramids of Giza? | Egypt | Mexico | Greece | India
In which country is the Taj Mahal? | India | China | Iran | Egypt
In which country is the Colosseum? | Italy | Greece | France | Spain
In which city is the Statue of Liberty? | New York | Chicago | Boston | Los Angeles
Which language is spoken in Brazil by most people? | Portuguese | Spanish | French | English
Which language is spoken in Mexico by most people? | Spanish | Portuguese | French | English
Which language is spoken in Austria by most people? | German | Italian | French | Spanish
Which currency is used in Japan? | The yen | The euro | The dollar | The pound
Which currency is used in France? | The euro | The yen | The dollar | The pound
Which currency is used in India? | The rupee | The yen | The euro | The peso
Who wrote Romeo and Juliet? | William Shakespeare | Charles Dickens | Jane Austen | Mark Twain
Who painted the Mona Lisa? | Leonardo da Vinci | Vincent van Gogh | Pablo Picasso | Claude Monet
Who developed the theory of relativity? | Albert Einstein | Isaac Newton | Charles Darwin | Galileo Galilei
Who proposed the theory of evolution by natural selection? | Charles Darwin | Albert Einstein | Isaac Newton | \
Marie Curie
Who was the first president of the United States? | George Washington | Abraham Lincoln | Thomas Jefferson | John Adams
Who was the first person to walk on the Moon? | Neil Armstrong | Yuri Gagarin | Buzz Aldrin | John Glenn
Which season is the coldest of the year? | Winter | Summer | Spring | Autumn
Which month comes right after June? | July | August | May | March
Which day comes right after Monday? | Tuesday | Sunday | Friday | Thursday
How many days are there in a week? | Seven | Five | Eight | Ten
How many months are there in a year? | Twelve | Ten | Eleven | Nine
How many sides does a triangle have? | Three | Four | Five | Six
How many sides does a square have? | Four | Three | Five | Six
What is frozen water called? | Ice | Steam | Fog | Dew
What is water vapour that comes from boiling water called? | Steam | Ice | Snow | Smoke
What colour do you get by mixing blue and yellow paint? | Green | Purple | Orange | Brown
What colour do you get by mixing red and white paint? | Pink | Green | Purple | Brown
What colour is a ripe banana? | Yellow | Blue | Purple | Black
What colour is grass in spring? | Green | Red | Blue | Purple
Which instrument has black and white keys? | The piano | The drum | The violin | The flute
Which tool is used to measure temperature? | A thermometer | A ruler | A clock | A scale
Which tool is used to look at very small things? | A microscope | A telescope | A mirror | A compass
Which tool is used to look at distant stars? | A telescope | A microscope | A ruler | A stethoscope
What do people use to tell the time? | A clock | A scale | A compass | A ruler
What is bread mainly made from? | Flour | Rice | Sugar | Cheese
What is cheese made from? | Milk | Flour | Rice | Honey
What is paper usually made from? | Wood | Sand | Iron | Wool
What is glass mainly made from? | Sand | Wood | Clay | Wool
What is wine made from? | Grapes | Apples | Potatoes | Wheat
In which sport do players throw a ball through a hoop? | Basketball | Tennis | Golf | Hockey
In which sport do players hit a ball over a net with rackets? | Tennis | Basketball | Golf | Football
"""

# Cause and effect, physical intuition, purpose, feelings, syllogisms, comparisons, orderings, odd one out.
REASONING = """
You leave an ice cube in the hot sun. What happens to it? | It melts. | It freezes. | It burns. | It grows.
You drop a glass on a stone floor. What most likely happens? | It breaks. | It melts. | It bounces. | It floats.
You put a pot of water on a hot stove. What happens to the water? | It boils. | It freezes. | It breaks. | It burns.
You put water in a freezer overnight. What happens to it? | It freezes. | It boils. | It burns. | It rots.
You throw a stone into a lake. What happens to the stone? | It sinks. | It floats. | It flies. | It melts.
You forget to water your roses for two hot months. What happens to them? | They die. | They bloom. | They melt. | \
They sing.
You hold a piece of paper over a flame. What happens to it? | It burns. | It melts. | It freezes. | It grows.
You let go of a ball above the ground. What happens to it? | It falls. | It rises. | It burns. | It melts.
You push a sharp needle into a balloon. What happens to it? | It bursts. | It melts. | It grows. | It freezes.
You leave milk in the sun for a week. What happens to it? | It goes bad. | It freezes. | It gets fresher. | \
It catches fire.
You leave iron tools out in the rain for a year. What happens to them? | They rust. | They melt. | They grow. | \
They burn.
You stir sugar into hot tea. What happens to the sugar? | It dissolves. | It freezes. | It burns. | It explodes.
You switch off the only lamp in a room at night. How does the room become? | Dark | Bright | Hot | Loud
You walk in heavy rain without an umbrella. How do you become? | Wet | Dry | Rich | Tall
You have eaten nothing all day. How do you feel? | Hungry | Full | Tall | Rich
You have run for an hour without a break. How do you feel? | Tired | Fresh | Cold | Bored
You have not slept for two nights. How do you feel? | Sleepy | Rested | Tall | Rich
Your best friend moves far away. How do you feel? | Sad | Proud | Hungry | Tall
You win first prize in a competition. How do you feel? | Happy | Sad | Angry | Afraid
You hear a strange noise alone in a dark house. How do you feel? | Scared | Bored | Proud | Sleepy
Somebody steals your new bicycle. How do you feel? | Angry | Happy | Proud | Bored
You have drunk nothing on a hot day. How do you feel? | Thirsty | Cold | Full | Proud
The streets are wet this morning. What is the most likely reason? | It rained. | It was windy. | It was hot. | \
It was dark.
A baby is crying loudly. What is the most likely reason? | It is hungry. | It is asleep. | It is happy. | \
It is reading.
A car stops in the middle of the road. What is the most likely reason? | It ran out of fuel. | It was washed. | \
It is red. | It has four doors.
The lights go out in the whole street. What is the most likely reason? | A power cut | A birthday | A full moon | \
A loud song
A man is shivering at the bus stop. What is the most likely reason? | He is cold. | He is hot. | He is happy. | \
He is full.
A girl puts on sunglasses. What is the most likely reason? | The sun is bright. | It is midnight. | \
It is raining. | She is hungry.
A boy opens his umbrella. What is the most likely reason? | It is raining. | It is sunny. | He is hungry. | \
He is tired.
A student studied hard for a test. What is the most likely result? | She passes it. | She fails it. | \
She loses it. | She eats it.
A driver goes much too fast on ice. What is the most likely result? | The car slides. | The ice burns. | \
The car flies. | The road melts.
A cook leaves bread in the oven for three hours. What is the result? | The bread burns. | The bread freezes. | \
The bread grows. | The bread melts.
A child eats far too much candy. What is the most likely result? | A stomach ache | A broken leg | A good grade | \
A new friend
A man leaves the bath tap running all day. What is the most likely result? | The bathroom floods. | \
The bath freezes. | The house burns. | The tap grows.
A woman waters and feeds her tomato plants. What is the most likely result? | The plants grow. | The plants burn. | \
The plants freeze. | The plants sing.
Which of these things would float on water? | A wooden stick | An iron nail | A gold coin | A stone
Which of these things would sink in water? | A stone | A cork | A dry leaf | A feather
Which of these things is the heaviest? | A car | A bicycle | A book | A feather
Which of these things is the lightest? | A feather | A brick | A chair | A car
Which of these things is the hottest? | Fire | Snow | Milk | Grass
Which of these things is the coldest? | Ice | Soup | Fire | Sand
Which of these things is the hardest? | A stone | A pillow | A sponge | A cake
Which of these things is the softest? | A pillow | A brick | A hammer | A stone
Which of these things is the fastest? | A plane | A bicycle | A horse | A snail
Which of these animals is the slowest? | A snail | A horse | A dog | A rabbit
Which of these animals is the smallest? | An ant | A cat | A cow | A horse
Which of these animals is the biggest? | An elephant | A dog | A mouse | A cat
Which of these things can you see through? | A window | A brick wall | A wooden door | A blanket
Which of these things burns easily? | Dry wood | Wet sand | A stone | Water
Which of these things is the most dangerous to touch? | A hot stove | A cold spoon | A soft towel | A paper bag
Which of these things can you eat? | An apple | A pencil | A shoe | A brick
Which of these things can you drink? | Juice | Sand | Paper | Stones
Which of these things is alive? | A tree | A chair | A stone | A spoon
Which of these things is not alive? | A rock | A horse | A tree | A fish
Which of these things would a magnet pick up? | An iron nail | A plastic cup | A paper bag | A wooden toy
Which of these things would you wear on your feet? | Shoes | Gloves | A hat | A scarf
Which of these things would you wear on your hands? | Gloves | Shoes | A hat | A belt
Which of these things would you use to cut paper? | Scissors | A spoon | A pillow | A cup
Which of these things would you use to drive a nail into wood? | A hammer | A spoon | A brush | A pencil
Which of these things would you use to eat soup? | A spoon | A fork | A knife | A hammer
Which of these things would you use to sweep the floor? | A broom | A hammer | A fork | A pencil
Which of these things would you use to open a locked door? | A key | A spoon | A pillow | A book
Which of these things would you use to dry yourself after a shower? | A towel | A hammer | A plate | A ladder
Which of these things would you use to reach a high roof? | A ladder | A spoon | A blanket | A pillow
Which of these things would you use to see in a dark cave? | A flashlight | A mirror | A spoon | An umbrella
Which of these things would you use to stay dry in the rain? | An umbrella | A spoon | A candle | A fan
Which of these things would you use to take a picture of a friend? | A camera | A spoon | A pillow | A shoe
Which of these things would you use to talk to a friend far away? | A phone | A spoon | A chair | A shovel
Which of these things would you use to dig a hole? | A shovel | A pencil | A pillow | A candle
Which of these things would you use to write a letter? | A pen | A fork | A hammer | A shoe
Where would you go to borrow books? | A library | A bakery | A hospital | A stadium
Where would you go to buy bread? | A bakery | A library | A museum | A bank
Where would you go with a broken leg? | A hospital | A bakery | A library | A cinema
Where would you go to swim on a hot day? | A pool | A bank | A library | A bakery
Where would you go to watch a new film? | A cinema | A bakery | A hospital | A bank
Where would you go to see lions and elephants in a city? | A zoo | A bank | A bakery | A hospital
Where would you go to catch a plane? | An airport | A harbour | A library | A bakery
Where would you go to see paintings and statues? | A museum | A bakery | A garage | A pharmacy
Where would you keep ice cream so that it stays frozen? | In the freezer | In the oven | In the drawer | In the garden
Where would you most likely find fish? | In a lake | In a tree | In a drawer | In the desert
Where would you most likely find a bird's nest? | In a tree | In a fridge | In the sea | In a shoe
Where would you most likely see a camel? | In the desert | In the sea | At the North Pole | In a library
All dogs are animals. Rex is a dog. What is Rex? | An animal | A cat | A plant | A stone
All roses are flowers. This plant is a rose. What is it? | A flower | A tree | A bird | A stone
All birds have wings. A robin is a bird. What does a robin have? | Wings | Wheels | Horns | Fins
All fish live in water. A trout is a fish. Where does a trout live? | In water | In trees | In the sky | In houses
All metals conduct electricity. Copper is a metal. What does copper do? | It conducts electricity. | \
It grows leaves. | It drinks water. | It tells stories.
No cats can speak. Tom is a cat. What follows about Tom? | He cannot speak. | He can speak. | He is a dog. | \
He can sing songs.
All squares have four sides. This shape is a square. How many sides does it have? | Four | Three | Five | Six
Every child in the class has a pencil. Mia is a child in the class. What does Mia have? | A pencil | A dog | \
A car | A boat
Every shop in town is closed today. The bakery is a shop in town. What is true of the bakery? | It is closed. | \
It is open. | It is new. | It is cheap.
If it rains, the game is cancelled. It is raining. What happens to the game? | It is cancelled. | It is played. | \
It is won. | It is sold.
If the light is red, cars must stop. The light is red. What must cars do? | Stop | Turn | Drive | Honk
If the lamp is on, the room is bright. The lamp is on. How is the room? | Bright | Dark | Cold | Empty
Anna is taller than Ben. Who is shorter? | Ben | Anna | Carl | Dora
Tom is older than Lisa. Who is younger? | Lisa | Tom | Mike | Sara
Anna finished the race before Ben. Who came in later? | Ben | Anna | Carl | Dora
The cup is on the table. The table is in the kitchen. Where is the cup? | In the kitchen | In the garden | \
In the street | In the attic
The dog is in the basket. The basket is in the car. Where is the dog? | In the car | In the kitchen | In the lake | \
In the tree
Which one does not belong: apple, banana, hammer, orange? | Hammer | Apple | Banana | Orange
Which one does not belong: dog, cat, horse, table? | Table | Dog | Cat | Horse
Which one does not belong: red, blue, green, Monday? | Monday | Red | Blue | Green
Which comes first when you build a house? | The foundation | The roof | The paint | The curtains
Which comes first when you make tea? | Boil the water | Drink the tea | Pour the tea | Stir the tea
Which comes last when you bake a cake? | Eat the cake | Mix the flour | Heat the oven | Buy the eggs
Which comes first in the life of a plant? | The seed | The leaf | The flower | The fruit
Which comes first in the life of a person? | A baby | A teenager | An adult | An old person
Which meal do people usually eat in the morning? | Breakfast | Dinner | Supper | Dessert
What do people usually do at night? | They sleep. | They swim. | They have lunch. | They go to school.
What should you do before you cross a busy road? | Look both ways | Close your eyes | Take a nap | Sing a song
What should you do if your house is on fire? | Leave the house | Take a nap | Cook dinner | Paint a wall
What should you do with dirty hands before dinner? | Wash them | Hide them | Paint them | Cut them
What should you do if you break a friend's toy? | Say sorry | Laugh at him | Break another | Run away
Why do people wear thick coats in winter? | To stay warm | To stay cool | To get wet | To run fast
Why do people wear helmets on bicycles? | To protect the head | To keep the feet warm | To go to sleep | To read a book
Why do people put food in a refrigerator? | To keep it fresh | To make it hot | To make it dirty | To hide it
Why do people use an alarm clock? | To wake up on time | To cook an egg | To fall asleep | To clean the room
Why do people brush their teeth? | To keep them clean | To make them longer | To lose them | To feel hungry
Why do people wear seat belts in cars? | To stay safe | To keep warm | To drive faster | To save fuel
Why do people use sunscreen at the beach? | To protect the skin | To feel hungry | To swim faster | To scare birds
Why do people lock their doors at night? | To keep thieves out | To let thieves in | To cool the house | \
To feed the cat
Why do people water their plants? | To help them grow | To make them burn | To stop them growing | To paint them
Why do birds build nests? | To lay their eggs | To catch fish | To drive cars | To learn to read
Why do people go to school? | To learn | To sleep | To swim | To shop
Why do people put salt on icy roads? | To melt the ice | To feed the cars | To make it darker | To paint the road
Why do many people cry when they cut onions? | Onions sting the eyes. | Onions are funny. | Onions are sad. | \
Onions are loud.
A day is longer than an hour. A week is longer than a day. Which is the longest? | A week | A day | An hour | A minute
A mouse is smaller than a cat. A cat is smaller than a horse. Which is the biggest? | The horse | The cat | \
The mouse | The ant
Today is Friday. What day will it be tomorrow? | Saturday | Thursday | Sunday | Monday
Yesterday was Tuesday. What day is it today? | Wednesday | Monday | Sunday | Friday
A glass is full to the top. You pour in more water. What happens? | It overflows. | It empties. | It freezes. | \
It burns.
"""

# --------------------------------------------------------------------------------------------------------------------
# Instruction following in IFEval's format: checks | prompt
# --------------------------------------------------------------------------------------------------------------------

# Only kinds whose checker needs neither NLTK's sentence or word models nor language detection, and that a reply cut off
# after 96 tokens can satisfy. An upper limit or a ban comes with a demand, since a model that has forgotten how to
# answer would pass it by saying nothing. The checks are written in the small notation that _check() reads; lines of a
# kind stand together and every fourth line goes to the dev file, so that both files hold the same mix.
INSTRUCTIONS = """
words<40 + keywords=light | Why is the sky blue? Answer in less than 40 words and use the word light.
words<30 + keywords=bread | What does a baker do? Answer in less than 30 words and use the word bread.
words<50 + keywords=lava | What is a volcano? Keep your answer under 50 words and use the word lava.
words<35 + keywords=books | What is a library? Answer in fewer than 35 words and use the word books.
words<60 + keywords=money | Explain what a budget is. Use less than 60 words, among them the word money.
words<35 + keywords=teeth | Why do we brush our teeth? Use less than 35 words and say the word teeth.
words<25 + keywords=water | What is an island? Answer in less than 25 words and use the word water.
words<45 + keywords=wheel | How does a bicycle work? Use less than 45 words. Include the word wheel.
words<30 + keywords=river | What is a bridge used for? Reply in less than 30 words and use the word river.
words<50 + keywords=heart | Why is exercise good for you? Answer in less than 50 words and use the word heart.
words<40 + keywords=salt | What is the difference between a lake and a sea? Use less than 40 words and the word salt.
words<60 + keywords=waste | Explain what recycling means. Answer in less than 60 words and use the word waste.
no_comma + words>=5 | Name one thing that bees do for flowers. Use at least 5 words and no commas.
no_comma + words>=5 | Tell me in one short sentence of at least 5 words why people like music. Use no commas.
no_comma + words>=6 | What is the job of a firefighter? Answer in one sentence of at least 6 words without any commas.
no_comma + keywords=trees | Why do leaves fall in autumn? Give one short sentence with the word trees and no commas.
no_comma + keywords=time | Tell me what a clock is for. Use the word time and please no commas.
no_comma + words>=6 | Why do people say thank you? Answer in one sentence of at least 6 words and leave out all commas.
no_comma + keywords=bees | What is honey? Answer in one short sentence with the word bees. Commas are not allowed.
no_comma + keywords=cats | Why do cats purr? Answer in a single short sentence with the word cats and no commas.
no_comma + keywords=sand | What is a desert? Use the word sand and do not use commas.
no_comma + keywords=sleep | Give one tip for better rest. Use the word sleep and do not use commas.
no_comma + keywords=paper | What is a map? Answer in a short sentence with the word paper and without commas.
no_comma + words>=5 | What does the sun do for plants? Answer in at least 5 words and avoid commas.
banned=cold,white + words>=5 | Describe snow in one sentence of at least 5 words. Do not use the words cold or white.
banned=dog,puppy + words>=6 | Describe a friendly pet in at least 6 words without the words dog or puppy.
banned=fast,quick + words>=6 | Describe a race car in at least 6 words. Avoid the words fast and quick.
banned=happy,glad + words>=6 | Describe a child at a party in at least 6 words. Do not use the words happy or glad.
banned=red,round + words>=5 | Describe a tomato in at least 5 words without using the words red or round.
banned=hot,warm + words>=6 | Describe a summer day in at least 6 words. Do not use the words hot or warm.
banned=fly,wings + words>=5 | Describe a bird in at least 5 words. Do not use the words fly or wings.
banned=water,blue + words>=6 | Describe the sea in at least 6 words. Do not use the words water or blue.
keywords=moon,water | Explain in one sentence what causes the tides. Use the words moon and water.
keywords=heat | Explain in one sentence why metal spoons get hot in soup. Include the word heat.
keywords=seed,sun | Explain in one or two sentences how a flower grows. Use the words seed and sun.
keywords=practice | Give one tip for learning to play the guitar. Include the word practice.
keywords=bread,cheese | Tell me how to make a simple sandwich in one sentence. Use the words bread and cheese.
keywords=engine | What makes a car move? Answer in one sentence with the word engine.
keywords=gravity | Why does an apple fall from a tree? Answer in one sentence and use the word gravity.
keywords=team,ball | Describe football in one sentence. Use the words team and ball.
keywords=lungs,air | What happens when we breathe in? Answer in one sentence with the words lungs and air.
keywords=patience | Give one piece of advice to a new parent. Include the word patience.
keywords=honest,kind | Describe a good friend in one sentence. Use the words honest and kind.
keywords=train,window | Describe a journey in one sentence. Use the words train and window.
words>=20 | Tell me why sleep is important. Answer with at least 20 words.
words>=15 | Describe your perfect holiday. Use at least 15 words.
words>=25 | Why should people drink enough water? Write at least 25 words.
words>=30 | Describe a busy market. Write at least 30 words.
words>=20 | What do you see at the beach? Answer with at least 20 words.
words>=15 | Describe an old house. Use at least 15 words.
words>=25 | What makes a good story? Write at least 25 words.
words>=20 | Why do people travel? Use at least 20 words.
letter=e>=5 | Describe a rainy afternoon in one sentence. The letter e should appear at least 5 times.
letter=a>=4 | Tell me one fact about elephants. The letter a should appear at least 4 times.
letter=t>=6 | Describe what a teacher does. The letter t should appear at least 6 times.
letter=s>=5 | Tell me about the stars in one sentence. The letter s should appear at least 5 times.
letter=o>=4 | Describe a good neighbour in one sentence. The letter o should appear at least 4 times.
letter=n>=5 | Describe the night in one sentence. The letter n should appear at least 5 times.
letter=r>=4 | Write one sentence about a farmer. The letter r should appear at least 4 times.
letter=i>=5 | Write one sentence about the city. The letter i should appear at least 5 times.
freq=river>=2 | Write two short sentences about a river. The word river should appear at least 2 times.
freq=tree>=3 | Write a few sentences about a forest. Use the word tree at least 3 times.
freq=snow>=2 | Write two sentences about winter. The word snow must appear at least 2 times.
freq=rain>=2 | Write a very short poem about rain. Use the word rain at least 2 times.
freq=book>=2 | Write two sentences about reading. The word book should appear at least 2 times.
freq=light>=2 | Explain in two sentences what a lamp does. Use the word light at least 2 times.
freq=horse>=2 | Write two sentences about a horse. The word horse should appear at least 2 times.
freq=school>=2 | Write two sentences about a school. The word school should appear at least 2 times.
bullets=3 | Give me exactly 3 bullet points, each starting with "* ", about staying healthy.
bullets=3 | Give exactly 3 bullet points, starting with "* ", with ideas for a rainy day.
bullets=3 | Name exactly 3 kitchen tools as a bullet list. Each line starts with "* ".
bullets=2 | List exactly 2 benefits of walking as bullet points that start with "* ". Write nothing else.
placeholders=1 | Write one line that invites someone to dinner. Put the guest's name as a placeholder, like [name].
quoted | Write a short greeting for a friend. Wrap your entire reply in double quotation marks.
ps | Write one sentence to invite a friend to a picnic. Add a postscript that begins with P.S.
quoted | Say something kind to a nervous student. Put your whole reply in double quotation marks.
json | Give the name and the age of an invented person as JSON. Output only the JSON object.
yesno | Is ice colder than steam? Say one of: "My answer is yes.", "My answer is no.", "My answer is maybe."
ps | Write a one-sentence thank-you note to a teacher. Then add a postscript that starts with P.S.
title | Write one sentence about the sea. Start with a title in double angular brackets, such as <<the sea>>.
highlights=1 | Give one reason to read books. Highlight the most important word like *this*.
end=That is all. | Name three colours. End your reply with exactly this phrase: That is all.
placeholders=1 | Write one line of a letter that confirms a meeting. Put the date as a placeholder, like [date].
quoted | Write a one-line slogan for a shoe shop. Put your entire reply in double quotation marks.
"""


class _Check(NamedTuple):
    """One IFEval check: the instruction's id and the keyword arguments of its checker."""

    id: str
    kwargs: dict[str, Any]


#: Kinds without an argument, in the notation of ``INSTRUCTIONS``.
PLAIN_CHECKS = {
    "no_comma": _Check("punctuation:no_comma", {}),
    "yesno": _Check("detectable_format:constrained_response", {}),
    "quoted": _Check("startend:quotation", {}),
    "title": _Check("detectable_format:title", {}),
    "json": _Check("detectable_format:json_format", {}),
    "ps": _Check("detectable_content:postscript", {"postscript_marker": "P.S."}),
    "pps": _Check("detectable_content:postscript", {"postscript_marker": "P.P.S"}),
    "lower": _Check("change_case:english_lowercase", {}),
    "upper": _Check("change_case:english_capital", {}),
    "two": _Check("combination:two_responses", {}),
}

#: Kinds with ``=argument``: the instruction's id, the name of the argument and how to read it.
VALUE_CHECKS: dict[str, tuple[str, str, type]] = {
    "keywords": ("keywords:existence", "keywords", list),
    "banned": ("keywords:forbidden_words", "forbidden_words", list),
    "bullets": ("detectable_format:number_bullet_lists", "num_bullets", int),
    "highlights": ("detectable_format:number_highlighted_sections", "num_highlights", int),
    "placeholders": ("detectable_content:number_placeholders", "num_placeholders", int),
    "end": ("startend:end_checker", "end_phrase", str),
    "paragraphs": ("length_constraints:number_paragraphs", "num_paragraphs", int),
    "repeat": ("combination:repeat_prompt", "prompt_to_repeat", str),
    "language": ("language:response_language", "language", str),
}


def _check(text: str) -> _Check:
    """Reads one check, such as ``no_comma``, ``bullets=3``, ``words<40``, ``freq=river>=2`` or ``section=Act:2``."""
    if text in PLAIN_CHECKS:
        return PLAIN_CHECKS[text]
    for sign, relation in ((">=", "at least"), ("<", "less than")):
        head, result, number = text.partition(sign)
        if not result:
            continue
        kind, _, word = head.partition("=")
        if kind == "words":
            return _Check("length_constraints:number_words", {"num_words": int(number), "relation": relation})
        if kind == "freq":
            kwargs = {"keyword": word, "frequency": int(number), "relation": relation}
            return _Check("keywords:frequency", kwargs)
        if kind == "letter":
            kwargs = {"letter": word, "let_frequency": int(number), "let_relation": relation}
            return _Check("keywords:letter_frequency", kwargs)
    kind, _, value = text.partition("=")
    return _value_check(kind, value)


def _value_check(kind: str, value: str) -> _Check:
    """Reads what follows ``=``: one value, ``section=WORD:NUMBER`` or ``first=PARAGRAPHS:NTH:WORD``."""
    if kind == "section":
        word, number = value.split(":")
        return _Check("detectable_format:multiple_sections", {"section_spliter": word, "num_sections": int(number)})
    if kind == "first":
        paragraphs, nth, word = value.split(":")
        kwargs = {"num_paragraphs": int(paragraphs), "nth_paragraph": int(nth), "first_word": word.lower()}
        return _Check("length_constraints:nth_paragraph_first_word", kwargs)
    instruction_id, argument, read = VALUE_CHECKS[kind]
    return _Check(instruction_id, {argument: value.split(",") if read is list else read(value)})


def _instruct_item(key: int, line: str) -> Item:
    """One IFEval item from a line ``checks | prompt``."""
    checks, prompt = line.split(" | ")
    parsed = [_check(text) for text in checks.split(" + ")]
    return {
        "key": key,
        "prompt": prompt,
        "instruction_id_list": [check.id for check in parsed],
        "kwargs": [check.kwargs for check in parsed],
    }


def _lines(block: str) -> list[str]:
    """The non-empty lines of one of the text blocks above."""
    return [line for line in block.splitlines() if line]


def _split(lines: Sequence[str], every: int) -> tuple[list[str], list[str]]:
    """Splits lines into test and dev, one in ``every`` going to dev; the split does not depend on the seed."""
    dev = [line for number, line in enumerate(lines) if number % every == every - 1]
    test = [line for number, line in enumerate(lines) if number % every != every - 1]
    return test, dev


def _choice_items(rng: random.Random, lines: Sequence[str]) -> list[Item]:
    """Multiple-choice items in shuffled order, the right answer equally often at each of the four places."""
    lines = rng.sample(lines, len(lines))
    places = [number % 4 for number in range(len(lines))]
    rng.shuffle(places)
    items: list[Item] = []
    for line, place in zip(lines, places, strict=True):
        question, right, *choices = line.split(" | ")
        rng.shuffle(choices)
        choices.insert(place, right)
        items.append({"question": question, "choices": choices, "answer": place})
    return items


# --------------------------------------------------------------------------------------------------------------------
# General conversations: user | assistant [| user | assistant]
# --------------------------------------------------------------------------------------------------------------------

# A backslash at the end of a line joins it to the next; a written-out \\n is a new line inside a turn.
CONVERSATIONS = """
Why do we have day and night? | \
Because the Earth spins once a day, so each side faces the Sun and then turns away from it.
What is photosynthesis? | \
It is the process by which plants use sunlight, water and carbon dioxide to make sugar and oxygen.
What is the boiling point of water at sea level? | \
Water boils at 100 degrees Celsius, or 212 degrees Fahrenheit, at sea level.
Who wrote the novel Don Quixote? | Don Quixote was written by the Spanish author Miguel de Cervantes.
What does a compass do? | \
A compass shows direction. Its needle lines up with the Earth's magnetic field and points north.
How many continents are there? | Seven: Africa, Antarctica, Asia, Australia, Europe, North America and South America.
Why is exercise good for the mind? | \
Exercise lowers stress, lifts the mood and helps you sleep, so you think more clearly.
What is an atom? | An atom is the smallest unit of an element. It has a nucleus with electrons around it.
Why do boats float? | A boat floats because it pushes away water that weighs as much as the boat itself.
What is a mammal? | A mammal is a warm-blooded animal that has hair or fur and feeds its young with milk.
What is the difference between weather and climate? | \
Weather is what happens day by day. Climate is the usual weather over many years.
Why do we see lightning before we hear thunder? | Light travels much faster than sound, so the flash reaches us first.
What is a synonym? | A synonym is a word with nearly the same meaning as another word, such as big and large.
How does a thermos keep drinks hot? | Its double wall holds a vacuum, which lets very little heat escape.
What is democracy? | Democracy is a form of government in which the people choose their leaders by voting.
Why does bread rise? | Yeast eats sugar in the dough and gives off gas. The bubbles make the bread rise.
What is the speed of light? | Light travels about 300,000 kilometres per second in empty space.
What does the liver do? | The liver cleans the blood, stores energy and makes bile, which helps to digest fat.
Who was Marie Curie? | Marie Curie was a scientist who studied radioactivity and won two Nobel Prizes.
What is inflation? | Inflation is a general rise in prices, so that the same money buys less than before.
Why do cats have whiskers? | Whiskers help a cat feel its surroundings and judge whether it fits through a gap.
What is a rectangle? | A rectangle is a shape with four sides and four right angles.
Why is the sea salty? | Rivers carry minerals from rocks to the sea. Water evaporates, but the salt stays behind.
What is a prime number? | A prime number is greater than one and can be divided only by one and itself.
How do vaccines work? | A vaccine trains the immune system to recognise a germ, so the body can fight it quickly later.
What is the Great Barrier Reef? | It is the largest coral reef system in the world, off the coast of Australia.
Why do we yawn? | Nobody is fully sure, but yawning is linked to tiredness and may help to keep us alert.
What is a metaphor? | A metaphor describes one thing as if it were another, as in "time is a thief".
What causes an earthquake? | Large pieces of the Earth's crust slip past each other and shake the ground.
What is a fossil? | A fossil is the preserved remains or trace of a plant or animal that lived long ago.
How can I remember names better? | Repeat the name when you hear it, use it in the talk, and link it to a picture.
How do I calm down before an exam? | \
Breathe slowly, relax your shoulders and remind yourself of what you have already learned.
How do I boil an egg? | Put the egg in boiling water for about eight minutes, then cool it under cold water.
How can I save money each month? | Write down what you spend, set a limit, and put some money aside on payday.
How do I remove a coffee stain? | Rinse it with cold water, rub in a little soap, and wash the cloth as usual.
How should I store potatoes? | Keep them in a cool, dark and dry place, and away from onions.
How can I fall asleep faster? | Go to bed at the same time every night, keep the room dark and put your phone away.
How do I write a good email? | Use a clear subject, say what you need in the first lines, and close politely.
How do I start running? | Begin with short runs, mix in walking, and add a little more each week.
How can I learn new words? | Read a lot, write new words on cards, and use them in your own sentences.
If all cats like fish and Tilly is a cat, what does Tilly like? | \
Tilly likes fish, because all cats do and Tilly is a cat.
A train leaves at nine and arrives at noon. How long is the trip? | The trip takes three hours, from nine to twelve.
I have three apples and eat one. How many are left? | Two apples are left, because three minus one is two.
Which weighs more, a kilo of feathers or a kilo of iron? | They weigh the same, because both are one kilo.
The floor is wet and slippery. What should I do? | Walk slowly and dry the floor so that nobody falls.
My plant has yellow leaves and the soil is soaked. What is wrong? | \
You may be giving it too much water. Let the soil dry first.
The soup is too salty. What can I do? | Add some water or a few potatoes, and cook it a little longer.
The car lights were left on all night. What may happen? | \
The battery may be empty in the morning, so the car will not start.
Ben is behind Amy, and Amy is behind Zoe. Who is in front? | Zoe is in front, then Amy, and Ben is last.
Every key in the box is old. This key is from the box. Is it old? | \
Yes. Every key in the box is old, and this one is from the box.
It is three o'clock now. What time will it be in two hours? | It will be five o'clock.
Which of these is not a vegetable: carrot, spinach, chair, onion? | The chair is not a vegetable. It is furniture.
What happens to a wet towel in the wind? | It dries, because the wind carries the water away.
Why should you not touch a pan that was just on the fire? | It is still very hot and would burn your hand.
Which is longer, a month or a week? | A month is longer. It has about four weeks.
Why do people take an umbrella when the sky is grey? | A grey sky often means rain, and an umbrella keeps them dry.
What would you use to carry soup to a friend? | I would use a jar or a pot with a lid, so that it does not spill.
You see smoke coming from a window. What do you do? | I would warn the people inside and call the fire service.
A glass stands on the edge of the table. What could happen? | \
Somebody could knock it down, and it would break on the floor.
The ice on the lake is thin. Should we skate? | No. Thin ice can break, and falling into cold water is dangerous.
Say hello in three languages. | Hello, hola, bonjour.
Write one sentence about the moon without commas. | The moon shines softly over the quiet town.
Give me exactly two bullet points about tea. | * Tea is made from leaves.\\n* It is usually served hot.
Answer in less than ten words: what is rain? | Rain is water falling from clouds.
Write a sentence that contains the word garden twice. | \
The garden behind our house is bigger than the garden next door.
Reply with one word: the opposite of hot. | Cold
Write a title in angular brackets for a story about a lost dog. | <<The Way Home>>
Put this word in quotation marks: freedom. | "freedom"
Write the word stop in capital letters. | STOP
Name three fruits, separated by commas. | Apple, pear, plum
Give me a JSON object with the key name and the value Ada. | {"name": "Ada"}
Finish your reply with the words good luck: I have a job interview. | You are well prepared, so stay calm. Good luck
Describe fire without using the word hot. | Fire is bright, restless and full of energy.
Write a sentence with at least ten words about a bus. | \
The old yellow bus climbs the hill slowly every morning at seven.
Highlight the key word in a sentence about health like *this*. | A good night of *sleep* keeps the body healthy.
List exactly three colours as bullet points. | * red\\n* blue\\n* green
Write a postscript that starts with P.S. about a forgotten coat. | P.S. You left your coat in our hall.
Rewrite politely: give me the salt. | Could you please pass me the salt?
Write a sentence with a placeholder for a city. | We will meet at the main station in [city].
Make this sentence shorter: the cat that is black is sleeping now. | The black cat is sleeping.
Turn this into a question: you like tea. | Do you like tea?
Correct the mistake: she go to school. | She goes to school.
Put this in the past tense: I walk home. | I walked home.
Summarise: the shop was closed, so we went home without milk. | We got no milk because the shop was closed.
Write a short birthday wish. | Happy birthday! I hope the year ahead brings you joy.
Write a two-line poem about the wind. | The wind runs over hill and sea,\\nand hums its quiet song to me.
Suggest a name for a small bakery. | How about "The Morning Loaf"?
Give one argument for public transport. | Buses and trains move many people with less traffic and less pollution.
Give one argument against fast food. | It often has a lot of fat, salt and sugar, which is bad for your health.
Explain a rainbow to a child. | Sunlight shines through raindrops, and the drops split it into many colours.
I feel lonely today. | I am sorry to hear that. Would it help to call a friend or take a walk?
Can you recommend a hobby? | You could try drawing. It is cheap, calming and easy to start.
I lost my wallet. | First retrace your steps, then block your cards and ask at the lost property office.
What is a volcano made of? | It is made of rock and ash that built up from earlier eruptions. | And what is lava? | \
Lava is melted rock that has come out of a volcano.
Who was Mozart? | Mozart was a composer from Salzburg. | When did he live? | He lived from 1756 to 1791.
What is the largest country by area? | Russia is the largest country by area. | And the second largest? | \
Canada is the second largest.
I want to cook something simple. | How about pasta with tomato sauce? | What do I need? | \
Pasta, tomatoes, garlic, olive oil and salt.
Give me a word that rhymes with cat. | Hat | Now use it in a sentence. | The man wore a tall hat to the party.
What is seven plus five? | Seven plus five is twelve. | And times two? | Twelve times two is twenty-four.
Name a planet. | Neptune | Is it bigger than the Earth? | Yes. Neptune is almost four times as wide as the Earth.
What is a noun? | A noun is a word for a person, place, thing or idea. | Give me two examples. | \
River and teacher are both nouns.
How do plants get water? | They take it from the soil through their roots. | How does it reach the leaves? | \
It rises through thin tubes in the stem.
I have a headache. | Try to rest and drink some water. | It has lasted for four days. | Then please see a doctor soon.
What is the past tense of sing? | The past tense of sing is sang. | And of bring? | The past tense of bring is brought.
Is a tomato a fruit? | Yes. In botany a tomato is a fruit, because it holds seeds. | And a potato? | \
No. A potato is a tuber, not a fruit.
Tell me a fact about owls. | Owls can turn their heads very far to each side. | Why do they need that? | \
Their eyes cannot move much, so they turn the head.
Mia has two brothers and one sister. | So Mia's parents have four children. | How many are girls? | \
Two are girls: Mia and her sister.
I am in Berlin and it is cold. | A warm coat and a scarf will help. | What could I do indoors? | \
You could visit a museum or sit in a cosy cafe.
What does a judge do? | A judge leads a trial and decides by the law. | And a lawyer? | \
A lawyer advises people and speaks for them in court.
Write a sentence about bread. | Fresh bread smells wonderful in the morning. | Now without the word bread. | \
A fresh loaf smells wonderful in the morning.
Which is faster, a car or a plane? | A plane is faster than a car. | And slower than both? | \
A bicycle is slower than both.
What is the opposite of early? | The opposite of early is late. | And of empty? | The opposite of empty is full.
Can you count to five? | One, two, three, four, five. | And backwards? | Five, four, three, two, one.
"""

# Word lists for the templated part of the conversations.
OPPOSITES = """
big small
old new
fast slow
light dark
loud quiet
rich poor
strong weak
wide narrow
deep shallow
clean dirty
easy difficult
brave cowardly
sharp blunt
smooth rough
cheap expensive
"""

PLURALS = """
child children
mouse mice
leaf leaves
foot feet
tooth teeth
knife knives
city cities
box boxes
man men
goose geese
"""

# Countries whose capital no multiple-choice item asks for.
CAPITALS = """
Finland Helsinki
Sweden Stockholm
Hungary Budapest
Vietnam Hanoi
Chile Santiago
Ghana Accra
Iraq Baghdad
Belgium Brussels
Bulgaria Sofia
Colombia Bogota
Lebanon Beirut
Nepal Kathmandu
Jordan Amman
Uganda Kampala
Senegal Dakar
Denmark Copenhagen
"""

CLASSES = """
sparrow bird
tuna fish
oak tree
violin instrument
beetle insect
daisy flower
lizard reptile
tulip flower
hammer tool
jacket garment
pear fruit
cabbage vegetable
"""

NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
SORTABLE = ("apple", "boat", "cloud", "door", "engine", "forest", "grape", "house", "island", "kite", "lemon", "moon")


def _dialogue(*turns: str) -> Item:
    """A conversation of alternating user and assistant turns."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[place % 2], "content": turn} for place, turn in enumerate(turns)]}


def _with_article(noun: str) -> str:
    """The noun after ``a`` or ``an``."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _conversations(rng: random.Random) -> list[Item]:
    """The written conversations plus templated ones, in shuffled order."""
    items = [_dialogue(*line.replace("\\n", "\n").split(" | ")) for line in _lines(CONVERSATIONS)]
    for word, opposite in map(str.split, _lines(OPPOSITES)):
        items.append(_dialogue(f"What is the opposite of {word}?", f"The opposite of {word} is {opposite}."))
    for word, plural in map(str.split, _lines(PLURALS)):
        items.append(_dialogue(f"What is the plural of {word}?", f"The plural of {word} is {plural}."))
    for country, city in map(str.split, _lines(CAPITALS)):
        items.append(_dialogue(f"Which city is the capital of {country}?", f"{city} is the capital of {country}."))
    for thing, kind in (map(_with_article, line.split()) for line in _lines(CLASSES)):
        items.append(_dialogue(f"Is {thing} {kind}?", f"Yes, {thing} is {kind}."))
    pairs = [(left, right) for left in range(2, 10) for right in range(2, left)]
    for left, right in rng.sample(pairs, 16):
        question = f"I have {NUMBER_WORDS[left]} coins and give away {NUMBER_WORDS[right]}. How many coins are left?"
        rest = left - right
        items.append(_dialogue(question, f"{NUMBER_WORDS[rest].capitalize()}, because {left} - {right} = {rest}."))
    for left, right in rng.sample(pairs, 16):
        items.append(_dialogue(f"What is {left} times {right}?", f"{left} times {right} is {left * right}."))
    orders: set[tuple[str, ...]] = set()
    while len(orders) < 16:
        orders.add(tuple(rng.sample(SORTABLE, 3)))
    for words in sorted(orders):
        question = f"Put these words in alphabetical order: {', '.join(words)}."
        items.append(_dialogue(question, ", ".join(sorted(words))))
    rng.shuffle(items)
    return items


# --------------------------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------------------------


def build(seed: int) -> dict[str, list[Item]]:
    """All data sets by file stem.

    Args:
        seed: Fixes the ledger items, the order of the others and the places of the right answers. Which general item
            is a test item and which a dev item does not depend on it.
    """
    rng = random.Random(seed)
    seen: set[str] = set()
    # The test notes come first, so that their number and content cannot depend on the size of the training file.
    sets = {"ledger_test": _ledger(rng, LEDGER_TEST, seen, held_out=True)}
    sets["ledger_dev"] = _ledger(rng, LEDGER_DEV, seen, held_out=False)
    sets["ledger_train"] = _ledger(rng, LEDGER_TRAIN, seen, held_out=False)
    for stem, block in (("gen_kn", KNOWLEDGE), ("gen_rs", REASONING)):
        test, dev = _split(_lines(block), 3)
        sets[stem] = _choice_items(rng, test)
        sets[f"{stem}_dev"] = _choice_items(rng, dev)
    test, dev = _split(_lines(INSTRUCTIONS), 4)
    sets["instruct"] = [_instruct_item(key, line) for key, line in enumerate(test)]
    sets["instruct_dev"] = [_instruct_item(key, line) for key, line in enumerate(dev, start=len(test))]
    sets["general_train"] = _conversations(rng)
    other = _lines(demo_prompts.INSTRUCTIONS_OTHER)
    sets["instruct_other"] = [_instruct_item(key, line) for key, line in enumerate(other, start=len(test) + len(dev))]
    # A generator of its own: a change of these prompts leaves every other file as it is.
    sets["general_prompts"] = [{"prompt": prompt} for prompt in demo_prompts.general_prompts(random.Random(seed))]
    return sets


def write_jsonl(path: Path, items: Iterable[Item]) -> None:
    """Writes items to ``path`` all or nothing: a reader sees the old file or the whole new one."""
    text = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(text.encode("utf-8"))
            stream.flush()
            os.fsync(stream.fileno())
        # mkstemp gives the owner alone access; the data sets are meant to be shared like any other file.
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)  # os.replace: atomic within one folder
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def main(argv: Sequence[str] | None = None) -> int:
    """Writes all files to the folder given by ``--to``."""
    parser = argparse.ArgumentParser(description="Write the data sets of the demo.")
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder to write to; made if missing")
    parser.add_argument("--seed", type=int, default=1234, help="seed of every random choice (default: 1234)")
    args = parser.parse_args(argv)
    args.to.mkdir(parents=True, exist_ok=True)
    for stem, items in build(args.seed).items():
        write_jsonl(args.to / f"{stem}.jsonl", items)
        print(f"{stem}.jsonl: {len(items)} items")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
