"""The prompts of the demo's rehearsal, and test prompts unlike any of them. Written for the demo, nothing is copied.

`general_prompts` feeds `cofitune rehearse`: the base model answers these prompts, and its answers are trained beside
the speciality. About half of them carry an instruction that IFEval could check, of every kind that it knows.
`INSTRUCTIONS_OTHER` asks for the same kinds in other words about other things: whoever follows it has kept the ability
and not only the rehearsed sentences.
"""

from __future__ import annotations

import random

# --------------------------------------------------------------------------------------------------------------------
# General prompts: patterns, then fills. Prompt i is pattern i (they go round) with the fields of fill i, so no fill is
# used twice. A backslash at the end of a line joins it to the next.
# --------------------------------------------------------------------------------------------------------------------

#: Kinds without a formatting instruction.
FREE = {
    "at_length": (
        """
Tell me about {0}. Take your time.
Describe {0} in some detail.
What should I know about {0}?
Could you write a few sentences about {0}?
I am curious about {0}. What can you tell me?
Write a paragraph about {0}.
""",
        """
the Roman army
living on a houseboat
jazz music
how paper is made
the Amazon rainforest
a typical day in a hospital
keeping bees
the invention of the printing press
growing up in a small village
deep-sea creatures
the work of a stage designer
African elephants
a night train through the Alps
the history of chess
raising twins
how glaciers shape a valley
a good breakfast
working from home
the planet Saturn
old lighthouses
a crowded market in Morocco
stage fright
the life of a salmon
cheese making
how bridges are tested
sign language
the first day at a new school
the Vikings' ships
a rainy afternoon in Paris
bicycle repair
the people who build violins
what dogs can smell
a power cut in a big city
sand dunes
the rules of baseball
public libraries
""",
    ),
    "explain": (
        """
Explain to a ten-year-old, in two sentences, {0}.
In one or two sentences, explain {0}.
Can you briefly explain {0}?
I never understood {0}. Please use plain words and three sentences at most.
Give me a short explanation of {0}, with one everyday example.
""",
        """
how a microwave heats food
how interest on a loan works
what happens during an eclipse
how a fridge stays cold
how swallows find their way south
how a search engine finds pages
how supply and demand set a price
how a magnet works
how muscles grow
how a website keeps passwords safe
how a touch screen notices a finger
how noise-cancelling headphones work
how a dam makes electricity
what a barcode is for
how a court reaches a verdict
""",
    ),
    "why": (
        """
Tell me briefly why {0}.
Do you know why {0}? Two sentences are enough.
My daughter asked me why {0}. What can I tell her?
In a few words, why is it that {0}?
Give me the main reason why {0}.
""",
        """
the moon changes its shape over a month
some people are left-handed
bread goes stale
dogs wag their tails
hot air rises
planes leave white trails behind them
many coins have ridges on the edge
we get goosebumps
old paper turns yellow
July days are longer than January days
cities are warmer than the countryside
chilli tastes hot
our ears pop in a plane
we laugh when somebody tickles us
many shops end their prices with ninety-nine cents
""",
    ),
    "how-to": (
        """
How do I {0}? Give me three short steps.
What is the easiest way to {0}? Two sentences, please.
Please tell me in a few words how to {0}.
I would like to {0}. Where do I start?
Walk me through this briefly: I want to {0}.
""",
        """
iron a shirt
change a flat tyre
grow basil in a pot
read more in a busy week
back up my phone
make scrambled eggs
sharpen a kitchen knife
write a CV without any work experience
tie a bow tie
defrost a freezer
get chewing gum off my shoes
measure a room for new curtains
memorise a short speech
pack a suit without creasing it
stop a door from squeaking
""",
    ),
    "compare": (
        """
What is the main difference between {0} and {1}?
Compare {0} with {1} in two sentences.
Which would you choose, {0} or {1}? Say why in a sentence or two.
Name one thing that {0} and {1} have in common, and one that sets them apart.
What speaks for {0}, and what for {1}? One sentence for each.
""",
        """
butter | margarine
a laptop | a tablet
a flat in town | a cottage in the hills
a frog | a toad
working at home | working in an office
a virus | a bacterium
jazz | classical music
cash | a credit card
a comet | an asteroid
electric cars | petrol cars
a novel | a short story
pine | oak
baking | frying
a king | a president
learning alone | learning in a group
""",
    ),
    "list": (
        """
Name three {0}.
Give me a list of four {0}, without explanations.
Which {0} come to mind first? Just list five.
I need three {0}. Separate them with semicolons.
List some {0}, one per line, five at most.
""",
        """
things to pack for a hike
vegetables that grow underground
inventors
jobs that computers have created
instruments with strings
countries in Africa
words that rhyme with blue
sources of protein
board games for two players
parts of a computer
rivers in Europe
words that mean the same as important
polite ways to say no
healthy snacks
things that are found in a toolbox
""",
    ),
    "brainstorm": (
        """
Suggest three names for {0}.
I am looking for a slogan for {0}. Give me two ideas.
Think of three original ideas for {0}. One line each.
What could be a good theme for {0}? Offer two suggestions.
Invent a catchy headline for {0}.
""",
        """
a blog about mopeds
a cafe that is run by students
a school science fair
a costume ball
a podcast about history
a team of young rowers
a garden centre
a grandmother's eightieth birthday
a photo exhibition
an article about lazy Sundays
an app that counts steps
a second-hand clothes shop
a newsletter for a small village
a quiz evening
a report about a very tall sunflower
""",
    ),
    "rewrite": (
        "{0}",
        """
Rewrite this sentence in a formal tone: Hey, can you send me that file again?
Make this message friendlier: Your report is late. Send it today.
Put this into simpler words: The committee has resolved to postpone its deliberations.
Shorten this without losing the meaning: Due to the fact that the lift was out of order, we had to use the stairs.
Correct the mistakes: their is two cup on the shelf
Turn this into the passive voice: The gardener cut the hedge.
Change this statement into a polite request: Open the door.
Rewrite this in the future tense: She visits her uncle.
Combine these into one sentence: The shop was small. It sold old stamps.
Make this sound more exciting: We walked through the tunnel.
Replace the word nice with a better one: We had a nice evening at the lakeside.
Say this in a more positive way: The room is tiny and dark.
Write this as reported speech: "I am tired," said Marco.
Make the sentence plural: The boy carries a heavy bag.
Add two adjectives to this sentence: The goat climbed the hill.
""",
    ),
    "summarise": (
        """
Summarise this in one sentence: {0}
What is the main point of this text? {0}
Give this paragraph a headline of at most six words: {0}
Boil this down to ten words or less: {0}
""",
        """
The town will close its old swimming hall in March. Repairs would cost more than a new one, and fewer people come.
Our printer has been out of order for three days. Until it is fixed, please use the one on the second floor.
Researchers counted fewer sparrows this year than last. They blame the lack of hedges and insects.
Because of the storm, the ferry did not leave on Saturday. Most guests stayed on the coast and left on Sunday.
Many people buy more food than they need. A shopping list helps them to waste less and spend less.
The new tram line opens in June. It links the station with the hospital and runs every ten minutes.
Nora wanted to be a nurse. After a year of training she noticed that she preferred to repair engines.
The old mill has stood empty for decades. Now a group of young potters wants to turn it into studios.
Farmers in the valley had too little rain this spring. They expect a small harvest and higher prices for wheat.
The team lost its first five games. Then a new coach came, and they have won every match since.
Kim found a purse on the bus and gave it to the driver. A week later she got a letter of thanks.
Cold brew coffee takes twelve hours. It tastes milder than hot coffee and keeps for a week in the fridge.
""",
    ),
    "e-mail": (
        """
Write a short e-mail to {0} to {1}.
Draft a message of two sentences to {0}. I want to {1}.
Write three polite lines to {0} in order to {1}.
What could I write to {0} to {1}? Keep it brief.
""",
        """
my landlord | report a broken heater
a customer | say that the parcel is delayed
my boss | ask for a day off on Friday
a former colleague | congratulate her on a new job
a hotel | ask for a late check-out
my aunt | thank her for the scarf
a tutor | move the lesson on Tuesday
the town hall | ask about the opening hours
a supplier | question a bill
the people next door | warn them about a loud evening
an applicant | turn him down kindly
the sports club | end my membership
a phone company | complain about the slow internet
an old classmate | suggest a reunion in May
""",
    ),
    "story": (
        """
Write the first two sentences of a story about {0}.
Begin a tale with {0}, and stop after three sentences.
Write a tiny story about {0}, fifty words at the most.
How could a mystery about {0} begin? Write only the opening line.
In four short sentences, tell a bedtime story about {0}.
""",
        """
a letter that arrives fifty years late
a fox who sells newspapers
a train that never stops
a village without shadows
a girl who can hear what flowers say
a watch that predicts the weather
two brothers on a raft
a cook who has lost his sense of taste
a stolen painting
a shy giant
a statue that blinks
a door in the middle of a field
an old pirate with a bad memory
a spaceship made of wood
a lonely snowflake
""",
    ),
    "poem": (
        """
Write a two-line rhyme about {0}.
Write a haiku about {0}.
Compose four lines of poetry about {0}.
I need a funny little verse about {0}.
Write a gentle poem, three lines long, about {0}.
""",
        """
a missing sock
the first day of spring
an empty playground
my noisy washing machine
a sleepy kitten
Monday mornings
an old typewriter
thick fog
a bowl of cherries
my grandfather's hat
crickets in the grass
the last bus home
a paper boat
a stubborn mule
a cup of cocoa
""",
    ),
    "define": (
        """
What does the word "{0}" mean?
Define {0} in one sentence.
What is meant by {0}? Keep it to a sentence.
Give me a simple definition of {0}, and then use it in a sentence.
How would a dictionary define {0}?
""",
        """
resilience
an algorithm
irony
biodiversity
a mortgage
hypothesis
a compromise
nostalgia
an ecosystem
inertia
subsidy
procrastination
a monarchy
an allergy
a monopoly
""",
    ),
    "knowledge": (
        """
{0}
{0} Answer briefly.
{0} One sentence is enough.
Quick question: {0}
I need this for a pub quiz: {0}
""",
        """
Which ocean lies between Africa and Australia?
Who invented the telephone?
How long does the Earth take to go round the Sun?
Which language do most people speak in Argentina?
Who composed The Four Seasons?
In which year did the Second World War end?
What is the longest river of South America?
Which cells of the blood fight infections?
What was the Silk Road?
Who was Nelson Mandela?
What are the three primary colours of light?
Which country is the home of the sauna?
What does DNA stand for?
What do the rings of a tree trunk tell us?
Why is the year 1492 famous?
How many players are in a volleyball team?
""",
    ),
    "arithmetic": (
        """
{0}
{0} Show the calculation in one line.
{0} Give only the result.
{0} Explain it in one sentence.
""",
        """
A ticket costs 12 dollars. How much do four tickets cost?
There are 30 pupils and 6 tables. How many pupils sit at each table?
Lena had 50 stickers, lost 14 and then got 9 more. How many does she have now?
A bus leaves at 8:15 and arrives at 9:05. How long is the ride?
What is 15 percent of 200?
A rope of 20 metres is cut into pieces of 4 metres. How many pieces are there?
If 3 pens cost 6 euros, what do 5 pens cost?
A box holds 12 eggs. How many boxes do I need for 40 eggs?
A jacket costs 80 dollars and is 25 percent off. What is the new price?
I drive 60 kilometres an hour. How far do I get in two and a half hours?
Which is more, two thirds or three quarters?
What is the sum of the whole numbers from 1 to 5?
A room is 4 metres long and 3 metres wide. What is its area?
Half of the 18 cookies are gone. How many remain?
What is 17 times 3, minus 1?
""",
    ),
    "logic": (
        """
{0}
{0} Give a one-sentence reason.
{0} Think about it step by step, but briefly.
""",
        """
If it is Sunday now, which day was it three days ago?
Eva runs faster than Jan, and Jan runs faster than Kai. Who is the slowest?
Every violet in the vase is purple. The flower in my hand is from the vase. Which colour does it have?
Which number continues the series 2, 4, 8, 16?
My uncle has a sister who has one son: me. Who is she?
Some drivers are tall. Leo is a driver. Can we be sure that Leo is tall?
Which word is the odd one out: sofa, wardrobe, trousers, shelf?
The red box is heavier than the blue one, and the blue one is heavier than the green one. Which is the lightest?
A plate was on the shelf. Now it lies in pieces on the tiles. What has probably happened?
Finger is to hand as toe is to what?
What comes next: Monday, Wednesday, Friday?
If nobody under eighteen may vote and Pia is sixteen, may she vote?
Paul faces north and turns right. Which way does he face now?
All tickets for the play are sold. I have no ticket. Can I still buy one?
""",
    ),
    "code": (
        """
Write one line of {0} that {1}.
Show me a short {0} snippet that {1}. No explanation.
Give me {0} code that {1}, three lines at most.
I am learning {0}. What does a line look like that {1}?
""",
        """
Python | adds up the numbers in a list
JavaScript | shows a box with the text Hello
Python | checks whether a number is even
SQL | counts the rows of a table named orders
HTML | makes a link to example.com
Python | writes a string backwards
CSS | makes all headings green
SQL | selects the names of all customers from Oslo
Bash | lists all text files in a folder
Python | makes a list of the squares from 1 to 10
JavaScript | finds the largest of three numbers
C | prints Good morning
Python | counts the vowels in a word
Bash | counts the lines of a file
""",
    ),
    "advice": (
        """
{0} What would you do?
{0} Please give me one piece of advice.
{0} Any quick tips?
{0} How should I handle this? Two sentences will do.
""",
        """
I keep forgetting birthdays.
My flatmate never does the dishes.
I feel nervous about my first day at work.
My son refuses to eat vegetables.
I spend too much time on my phone.
I had a quarrel with my sister.
I want to ask for a raise.
My back hurts after a day at the desk.
I cannot decide between two universities.
I have just moved to a town where I know nobody.
My laptop has become very slow.
I find it hard to say no.
A colleague takes credit for my work.
I get bored on long flights.
""",
    ),
    "classify": (
        "{0}",
        """
Is this review positive or negative? "The soup was cold and the waiter was rude."
Positive, negative or neutral? "The parcel came on Thursday."
Is this spam? Answer spam or not spam: "You have WON a cruise! Click here now!"
Fruit or vegetable: leek. Answer with one word.
Is the word "slowly" a noun, a verb or an adverb?
Which emotion does this sentence show, joy, anger or fear? "Leave my things alone!"
Sort these into land and water animals: shark, goat, squid, camel.
Formal or informal? "See ya later, mate!"
Is this a fact or an opinion? "Blue is the most beautiful colour."
To which subject does this belong, history or chemistry? "Acids react with metals."
Label the sentence as question, order or statement: "Close the lid."
Is this headline about sport or politics? "Parliament votes on new tax"
Decide if the customer is satisfied: "Third time I ordered here, and it was perfect again."
Living thing or object? moss, kettle, eel, spoon
""",
    ),
    "extract": (
        "{0}",
        """
Which city is mentioned here? "After two years in Lyon, Marta came home."
Find the date in this sentence: The exam was moved from Monday to 14 June.
Write down all names in this text: Rosa met Karim at the station, and Yuki came later.
What is the price? "The blue kettle is now only 19 dollars."
List the colours in this sentence: A grey van stood beside a pink fence.
Which verb is in this sentence? "The squirrel buries nuts."
Give me the phone number only: Call Ms Reed on 555-0142 after five.
Who is the sender? "Dear Tim, I will be late. Yours, Agnes"
Name the ingredients: Beat two eggs with milk, then stir in the flour.
What does the writer want? "Could somebody let me into the building? I forgot my card."
Which numbers appear here? "We sold 40 chairs and 7 benches in 3 weeks."
Which job does he have? "Every morning Otto delivers letters to our street."
Pull out the place and the time: The choir meets in the town hall at 7 pm.
Name the animal in this proverb: You cannot teach an old dog new tricks.
""",
    ),
    "reword": (
        "{0}",
        """
How do you say "good night" in Italian?
Translate into Spanish: The house is big.
What is the French word for cheese?
Say this in other words: It is raining cats and dogs.
What does the idiom "to break the ice" mean? One sentence, please.
Translate into German: I am hungry.
Explain the saying "Better late than never" in your own words, briefly.
Give another word for begin.
Put this British sentence into American English: My flat is near the motorway.
Which English word means both a flying animal and a thing to hit balls with?
What is the opposite of generous? Answer with a word and an example.
Express this without slang: I am totally broke.
Translate the Latin phrase "carpe diem".
Describe the meaning of "piece of cake" for somebody who learns English.
""",
    ),
    "chat": (
        "{0}",
        """
Hi! What can you help me with?
Tell me a clean joke about computers.
I had a long day. Say something encouraging in one or two sentences.
Pretend to be a medieval innkeeper and greet me in two sentences.
Let us play: give me a riddle, but not its answer.
Good morning! Share one surprising fact with me.
You are a strict librarian. Tell me in a sentence to be quiet.
What should I ask you if I want to learn something new today?
I just passed my driving test!
Act as an interviewer and ask me one question about my last job.
Do you have feelings? Answer in two sentences.
Recommend a type of film for a family evening, and say why in a sentence.
Thank you, that was helpful.
I have ten minutes to spare. Suggest something small to do.
""",
    ),
}

#: IFEval's kinds, by the name of the instruction. The first field is the task, the others are what the rule speaks of.
RULED = {
    # long answers, which training on short ones forgets first
    "at_least": (
        """
{0} Write {1} words or more.
{0} Not fewer than {1} words, please.
{0} Your reply should be {1} words long or longer, and {2} should come up.
{0} I would like {1} words at the very least.
{0} Have the word {2} in it two times or more.
{0} Make it {1} words or longer.
""",
        """
Why do people climb mountains? | 20 | view
What is it like to work in a circus? | 25 | tent
Describe a desert at noon. | 20 | sand
What makes a holiday restful? | 15 | rest
Why do cities have mayors? | 20 | city
What do you like about summer? | 20 | sun
Tell me about the work of a nurse. | 20 | care
Describe a train station on a Monday morning. | 25 | crowd
Why is honesty important at work? | 20 | trust
What happens when water boils? | 15 | steam
Describe a garden after the first frost. | 20 | leaves
What can one learn from a grandmother? | 25 | story
Why do some people love spicy food? | 15 | spice
Tell me what a film director does. | 20 | film
Describe the inside of a watchmaker's shop. | 25 | clock
Why do we need bridges? | 15 | river
What is good about learning to swim? | 20 | swim
Describe a kitchen where bread is being baked. | 20 | bread
How does a farmer spend an autumn day? | 25 | field
Why do children ask so many questions? | 20 | question
What makes a town feel safe? | 20 | street
Describe a ship that leaves the harbour. | 20 | ship
Tell me why some people keep fish. | 15 | fish
What should a visitor see in Egypt? | 20 | Nile
Describe a very old tree. | 20 | tree
Why is it hard to learn a new language? | 20 | words
What does a museum guide tell visitors? | 20 | museum
Describe a mother who waits for a letter. | 25 | letter
Why do athletes warm up? | 15 | muscles
What makes a chair comfortable? | 15 | back
Tell me about life in the Arctic. | 20 | ice
Describe a fair at night. | 20 | lights
What are the duties of a captain? | 20 | crew
Why do we remember some songs for years? | 20 | song
What is the charm of a small café? | 20 | coffee
Describe a field of sunflowers. | 15 | yellow
""",
    ),
    "keywords:existence": (
        """
{0} Use the word "{1}" somewhere.
{0} Make sure that "{1}" appears in it.
{0} The term {1} has to be in there.
Use the keyword {1} in your text: {0}
{0} Mention {1}.
{0} Work these words in: {1}, {2}.
""",
        """
Tell me in two sentences what a notary does. | document | law
Describe a thunderstorm briefly. | clouds | wind
What is a hedgehog like? Two sentences. | spines | night
Give one tip for growing roses. | soil | sun
Say in a sentence what a passport is for. | border | trip
Write three short sentences about a harbour. | gulls | nets
Why do people keep diaries? One or two sentences. | memory | pen
What happens in a bakery at five in the morning? | dough | oven
Explain in a sentence what a thermostat does. | temperature | room
Give a short piece of advice on job interviews. | confidence | smile
What is a canal? Keep it short. | boats | land
Describe an attic in two sentences. | dust | boxes
Write two lines about a blacksmith. | hammer | fire
Tell me something about camels in one sentence. | desert | hump
Say in two sentences why people apply for loans. | bank | house
Write a sentence about a bookshop in autumn. | shelves | quiet
""",
    ),
    "keywords:forbidden_words": (
        """
{0} You must not use the word "{1}".
{0} Leave out the words {1} and {2}.
{0} The words "{1}" and "{2}" are taboo.
{0} Do it without saying {1}.
Avoid {1} and {2} at all costs. {0}
""",
        """
Describe the taste of a lemon in a sentence. | sour | yellow
Describe a storm at sea in two sentences. | waves | wind
Say in two sentences what a doctor does. | sick | health
Describe a cow to somebody who has never seen one. Be brief. | milk | farm
Praise your favourite season in two sentences. | warm | cold
What is money? One sentence. | pay | coins
Describe a library card in a sentence. | book | borrow
Say what a knife is for. | cut | sharp
Describe the moon in one or two sentences. | night | bright
Write a sentence about a bear in spring. | hungry | forest
Write an advert for a sofa in two sentences. | soft | comfortable
Describe a traffic jam in a sentence. | cars | slow
Explain what a pillow is, in one sentence. | head | bed
Describe thirst in a sentence. | drink | dry
""",
    ),
    "keywords:frequency": (
        """
{0} See to it that "{1}" is found {2} times or more.
{0} Say "{1}" {2} times or more.
{0} I want to read the word {1} no fewer than {2} times.
{0} Let {1} come up at least {2} times.
{0} Use the word {1} less than {2} times.
""",
        """
Write three sentences about a mountain. | mountain | 3
Write two sentences about the colour green. | green | 2
Tell me about a king in two or three sentences. | king | 2
Write a short chant for a rowing club. | row | 3
Describe a cake in three sentences. | cake | 2
Praise a pair of shoes in two sentences. | shoes | 2
Write a brief note about time management. | time | 2
Write a lullaby of three lines. | sleep | 3
Say in two sentences why gardens are calming. | garden | 2
Tell me in three sentences what a bank is. | money | 2
Write two sentences about a lost glove. | glove | 2
Write a sentence or two about a tall ladder. | ladder | 2
""",
    ),
    "keywords:letter_frequency": (
        """
{0} The letter {1} should occur {2} times or more.
{0} Include at least {2} times the letter "{1}".
{0} I want no fewer than {2} instances of the letter {1}.
{0} Use the letter {1} fewer than {2} times.
""",
        """
Write a sentence about a busy kitchen. | e | 6
Write one line about spiders. | s | 4
Tell me in a sentence what a pilot needs. | a | 5
Write a sentence about a zoo. | z | 3
Describe a cold morning in a single sentence. | o | 5
Describe a castle in a sentence. | l | 4
Give me one sentence about tailors and their work. | t | 4
Write a short sentence about bread. | q | 2
Name a good deed in a sentence. | d | 3
Write a line about a lazy lion. | l | 5
Write one sentence about winter boots. | b | 3
Write a sentence about mothers. | m | 3
""",
    ),
    "language:response_language": (
        """
{0} Answer in {1}.
{0} The whole reply must be in {1}, no other language is allowed.
Please reply in {1} only. {0}
{0} Write {1}, not English.
""",
        """
Introduce yourself in two sentences. | Spanish
Write one sentence about wine. | French
Name two things that one sees in a kitchen. | German
Wish somebody a happy new year. | Italian
Say what you like to eat, in one sentence. | Portuguese
Tell me in a sentence what the weather is like in winter. | German
Invite a friend for dinner in one line. | French
Ask for the way to the station. | Spanish
Write a sentence about the sea of Naples. | Italian
Say thank you for a present in one or two sentences. | Spanish
""",
    ),
    "length_constraints:number_words": (
        """
{0} Answer in fewer than {1} words.
{0} You have {1} words at most.
Reply with no more than {1} words: {0}
{0} Write {2} words or more.
{0} Do not go over {1} words.
{0} I expect at least {2} words.
Be very brief, under {1} words: {0}
""",
        """
What is a democracy? | 25 | 10
Who was Cleopatra? | 20 | 10
What is the use of a passport photo? | 15 | 10
Describe a wedding. | 40 | 25
What does a surgeon do? | 20 | 10
Why do people keep gardens? | 40 | 20
What is sarcasm? | 20 | 10
What is a blog? | 25 | 10
Tell me about Iceland. | 30 | 10
How does one cook rice? | 30 | 10
Describe your ideal office. | 40 | 30
What is a mayor responsible for? | 20 | 10
Is it better to get up early? | 30 | 15
What is a rumour? | 12 | 10
What are taxes for? | 25 | 10
What is a pen name? | 15 | 10
""",
    ),
    "length_constraints:number_sentences": (
        """
{0} Use exactly {1} sentences.
{0} Your answer should have at least {1} sentences.
{0} No more than {1} sentences, please.
In {1} sentences: {0}
{0} Keep to {1} short sentences.
""",
        """
What is a museum? | two
Why do children play? | three
How does a sailing boat move? | three
Describe the life of a monk. | two
What makes a good leader? | three
What is a glossary? | two
Tell me about Vikings. | three
Why do we have laws? | two
What is an orchestra? | two
Tell me what an architect does. | two
What happens at an auction? | three
Describe a blizzard. | three
""",
    ),
    "length_constraints:number_paragraphs": (
        """
{0} Write two paragraphs and separate them with the markdown divider ***.
{0} There should be exactly 2 paragraphs with *** between them.
{0} Split your text into three very short paragraphs. Put *** between one and the next.
{0} Two paragraphs of one sentence each, divided by ***, are what I want.
""",
        """
What are the good and the bad sides of living in a city?
Describe a day and a night on a farm.
Tell me about breakfast, lunch and supper in Greece.
Describe two kinds of weather.
How do trains and planes differ?
What do students like, and what do they dislike?
Tell the beginning, the middle and the end of a fishing trip.
Say something about gold and something about silver.
""",
    ),
    "length_constraints:nth_paragraph_first_word": (
        """
{0} Write two paragraphs with an empty line between them. The second must start with the word {1}.
{0} Your answer has two short paragraphs, and paragraph 1 begins with "{1}". Separate them by a blank line.
{0} There should be 2 paragraphs, with two line breaks between them. Let paragraph 2 open with {1}.
""",
        """
Describe a walk in a park. | Later
Say what is good about tea. | Tea
Tell me how a shop opens and closes. | Finally
Give a short opinion on zoos. | However
Describe how a potato grows. | Potatoes
Tell me about a bad day that turned out well. | Suddenly
Write about a visit to the barber. | Afterwards
Write about cheese from Switzerland. | Cheese
""",
    ),
    "detectable_content:number_placeholders": (
        """
{0} Use at least {1} placeholders in square brackets, such as [{2}].
{0} Leave {1} gaps for me to fill, written like [{2}].
{0} Make it a template with {1} or more fields in brackets, for example [{2}].
{0} Put [{2}] wherever I have to insert something. I need at least {1} such fields.
""",
        """
Write a one-line reminder about a dentist's appointment. | two | date
Write the first two lines of a job application. | two | company
Write a short out-of-office note. | two | return date
Write a birthday card of two sentences. | two | name
Write a label for a jar of jam. | two | fruit
Write a one-sentence complaint about a flight. | two | flight number
Write the text of a lost-cat poster in two sentences. | three | phone number
Write a line that welcomes a new member to a club. | two | club
Write a short message to cancel a table in a restaurant. | two | time
Write a receipt for a rented bike in one sentence. | two | amount
""",
    ),
    "detectable_content:postscript": (
        """
{0} Below the text, add a postscript ({1}).
{0} Close with a postscript marked {1}
{0} Do not forget a last line after the letter, beginning with {1}
{0} Something has slipped your mind, so put it after {1} at the bottom.
""",
        """
Write two sentences to a pen pal about your week. | P.S.
Write a short note to the milkman. | P.S.
Write a one-sentence apology to a flatmate. | P.S.
Write two lines to your grandmother. | P.S.
Write a brief get-well message. | P.P.S
Write a line to a colleague about a missing stapler. | P.S.
Write two sentences to the editor of a newspaper. | P.P.S
Write a short love letter of two sentences. | P.S.
Write a note for the babysitter. Two sentences. | P.S.
Write a single line that praises a choir. | P.S.
""",
    ),
    "detectable_format:number_bullet_lists": (
        """
{0} Answer with exactly {1} bullet points like "* point".
{0} Make a markdown list of {1} bullets, each beginning with an asterisk.
{0} I want {1} bullets (use * for each) and no other text.
{0} Put your answer into {1} bullet points with *.
{0} Use {1} short lines, and begin every one of them with "* ".
{0} Present it as a bulleted list with {1} entries, using the sign *.
""",
        """
What should I bring to a picnic? | three
Why do people like trains? | two
What does a plant need? | three
Give me ideas for a gift to a colleague. | four
What can one cook with eggs? | three
How can I save energy at home? | three
Name spices. | five
What are the advantages of a small car? | two
What makes a hotel good? | three
Name parts of a ship. | four
What could I do on a Sunday in London? | three
What belongs in a first-aid kit? | four
Name things that children collect. | two
What can one see in Egypt? | three
How do I prepare for a power cut? | three
""",
    ),
    "detectable_format:constrained_response": (
        """
{0} Reply with one of these only: "My answer is maybe.", "My answer is no.", "My answer is yes."
{0} Choose among the options (My answer is no.) (My answer is yes.) (My answer is maybe.)
{0} Your reply must be "My answer is", followed by yes, no or maybe and a full stop.
""",
        """
Is copper a metal?
Can penguins fly?
Is gold heavier than wood?
Will it snow on Christmas Day in Paris?
Is five a prime number?
Do all birds sing?
Is Greenland warmer than Kenya?
Will robots teach all pupils one day?
""",
    ),
    "detectable_format:number_highlighted_sections": (
        """
{0} Highlight at least {1} words with single asterisks, *like here*.
{0} Mark {1} important parts in markdown, i.e. *important part*.
{0} Emphasise {1} or more phrases by putting * before and after them.
{0} Set {1} key terms between asterisks, for example *term*.
""",
        """
Explain in two sentences how steel is made. | 2
Give two reasons to learn a language. | 2
Tell me in a sentence what the lungs do. | 1
Describe the game of cricket in two sentences. | 2
Write two sentences about Rome. | 2
Give two safety rules for the kitchen. | 2
Tell me briefly what a lawyer is good for. | 2
Explain in three sentences how a caterpillar changes. | 3
Name the three states of matter in one sentence. | 3
What is the most useful invention? Two sentences. | 2
Tell me in two sentences how to choose a melon. | 2
Say in one sentence what plumbers repair. | 2
""",
    ),
    "detectable_format:multiple_sections": (
        """
{0} Your answer must have {1} sections. Mark the beginning of each with {2} X, as in {2} 1.
{0} Split it into {1} parts and head them {2} 1, {2} 2 and so on.
{0} Structure it in {1} sections, labelled "{2} 1" and up.
""",
        """
Give me a plan for a free weekend. | 2 | Day
Write very short rules for a shared kitchen. | 2 | Section
Tell the story of a seed in very few words. | 3 | Part
Describe how to paint a fence, briefly. | 2 | Step
Give two ideas for a play. One sentence each. | 2 | Scene
Sum up the pros and cons of television in a few words. | 2 | SECTION
Tell me what to do before and after a flight. Be brief. | 2 | Section
Write a tiny training plan. | 2 | Week
""",
    ),
    "detectable_format:json_format": (
        """
{0} Give the answer as JSON.
{0} Your whole output should be valid JSON, nothing before or after it.
{0} Format everything as a JSON object.
{0} Answer in JSON with the keys {1} and {2}.
Return a JSON object with the fields {1} and {2}. {0}
""",
        """
Name a country and its capital. | country | capital
Invent a book with its author. | title | author
Describe a cat with three properties. | name | colour
Name a fruit and its usual colour. | fruit | colour
Give me an example of a product in a shop. | product | price
Make up a weather report. | weather | degrees
What are two meals of the day? | first | second
Turn this into data: Ali is 30 and lives in Cork. | name | city
Name a planet and its place from the Sun. | planet | place
Invent a train with its time of departure. | train | time
""",
    ),
    "detectable_format:title": (
        """
{0} Give it a title in double angular brackets, like <<title>>.
{0} Begin with a title that is wrapped in << and >>.
{0} I also need a title, and it should look <<like this>>.
{0} Above your text, put a heading between << >>.
{0} Wrap the title of your text in double angle brackets: <<...>>.
""",
        """
Write two sentences about a lost suitcase.
Write a four-line poem about bread.
Write the first sentence of a crime novel.
Write a short recipe for tomato soup.
Summarise the life of a butterfly in two sentences.
Write a song of two lines about trains.
Tell a joke in two or three sentences.
Write a news item of two sentences about a runaway goat.
Write two sentences about courage.
Describe a painting of a storm in two sentences.
Write a diary entry of two sentences by a postman.
Write a limerick about a duke from Milan.
Describe the smell of a barn in two sentences.
""",
    ),
    "combination:two_responses": (
        """
{0} Give two different answers and separate them with six asterisks: ******
{0} I want two versions. Between them, and only there, put ******.
{0} Offer two alternatives, split by the symbols ******.
""",
        """
Write a one-line greeting for a shop window.
Suggest a name for a parrot.
What could I say to cheer up a teammate? One sentence.
Write a sentence about hope.
Propose a motto for a chess player.
Give me an excuse for being late.
Write a headline about a big fish.
Describe an apple in one sentence.
""",
    ),
    "combination:repeat_prompt": (
        """
{0} First repeat this question word for word, then give your answer.
{0} Before you answer, say my request again without any change.
{0} Copy the request above exactly, and then reply to it briefly.
""",
        """
What is the best time to visit Norway?
Name a tool that every home needs.
How long should one boil potatoes?
Why are some roads so straight?
Which animal is the best swimmer?
Tell me a use for old newspapers.
What does a goalkeeper do?
Where does rubber come from?
""",
    ),
    "startend:end_checker": (
        """
{0} Finish with these exact words: {1}
{0} The last sentence must be "{1}" and nothing may follow it.
{0} Stop with the phrase {1}
{0} Let your text end on: {1}
{0} Conclude by saying {1}
""",
        """
Give me one tip against stress. | Take it easy.
Tell me in two sentences why honesty matters. | And that is the truth.
Recommend a breakfast. One or two sentences. | Enjoy your meal!
Explain a power cut in two sentences. | Any other questions?
Say how to greet a queen. | Long live the queen.
Write a two-sentence advert for a vacuum cleaner. | Order now!
Tell me in a sentence what a calendar is. | Hope that helps.
Write a short toast for a wedding. | Cheers to the happy couple!
Give one argument for a shorter working week. | Think about it.
Name two things that a hiker needs. | Safe travels!
Write two sentences about a ghost. | Boo!
Describe how to brush a dog, in two sentences. | Is there anything else I can help with?
Encourage a gardener in one sentence. | Keep going!
Tell me briefly what a quorum is. | That is my answer.
""",
    ),
    "startend:quotation": (
        """
{0} Wrap the whole answer in double quotation marks.
{0} Your complete response has to stand between two " signs.
{0} Put quotation marks around everything that you write.
{0} Begin and end with the character ".
""",
        """
Write a sentence that a proud captain might say.
Give me a motto for a lazy day.
Say in one sentence what freedom is.
What would a tree say if it could talk? One or two sentences.
Write a line for a fortune cookie.
Invent a proverb about work.
Welcome a guest to a farm in a sentence.
Tell me a short fact about Canada.
Write a sentence of comfort for somebody who failed a driving test.
Write an opening line for a speech about the future.
Write a sentence of small talk about the weather.
Sum up the idea of teamwork in a sentence.
""",
    ),
    "change_case:english_lowercase": (
        """
{0} Write everything in lowercase letters.
{0} Use small letters only, no capitals anywhere.
{0} all of your answer should be in english and in lower case.
In all lowercase, please: {0}
{0} Capital letters are forbidden in your answer.
""",
        """
Tell me in two sentences what a lawn needs.
What is a sandwich? One or two sentences.
Give me a reason to visit Portugal.
Describe a busy airport in two sentences.
Why do we wear uniforms? Answer briefly.
How does one say sorry? Two sentences.
Write a short line about a turtle.
What do you know about Beethoven? Two sentences.
Tell me how to cool down on a summer night.
Write two sentences about a trip with an aunt.
What is a hobby? One sentence.
Describe a raincoat in a sentence or two.
Give one tip for taking photos of babies.
What is a suburb? One sentence.
""",
    ),
    "change_case:english_capital": (
        """
{0} Write in capital letters only.
{0} Your entire answer should be in English and in upper case.
SHOUT: use capitals for every letter. {0}
{0} No lowercase letters, please, only CAPITALS.
""",
        """
Warn people about wet paint in one sentence.
What is a headline? One sentence.
Write a sentence about a very loud drummer.
Name two things that a knight carries.
Give one rule for a swimming pool.
Announce the winner of a race in a sentence.
Tell me in one sentence what thunder is.
Write a short sign for a shop that sells cakes.
Why do babies cry? Answer in a sentence.
Say what an engine does, in one sentence.
""",
    ),
    "change_case:capital_word_frequency": (
        """
{0} Write at least {1} words in all capitals.
{0} Stress {1} or more words by putting them fully in CAPITAL letters.
{0} Words in all caps may appear fewer than {2} times.
{0} Use full capitals for {1} words or more.
""",
        """
Write a two-sentence advert for a bike shop. | two | five
Tell me in two sentences how to cross a street safely. | two | four
Describe NASA in two sentences. | one | four
Write a warning about a steep path. | three | six
Write two sentences about a football final. | two | five
Explain the rules of hide-and-seek briefly. | two | four
What is an SOS signal? Two sentences. | one | four
Write a message to somebody who is always late. | two | five
""",
    ),
    "punctuation:no_comma": (
        """
{0} Do not use any commas.
{0} Your answer must be free of commas.
{0} Please write it without a single comma.
{0} Refrain from commas.
{0} The comma key on your keyboard is broken, so do without it.
No commas, please. {0}
""",
        """
Why do we need traffic lights? Answer in two sentences.
Describe a spoon in a sentence.
Tell me in one sentence who Gandhi was.
What does an umpire do? Two short sentences.
Give one reason to plant hedges.
How is coffee grown? Be brief.
What is the point of homework? Two sentences.
Describe the sound of a bell in a sentence.
Tell me something about Scotland in two sentences.
Why do people collect stamps? One sentence.
What is a secret? A sentence or two.
Describe a birthday cake in two sentences.
Tell me how a key opens a lock. One or two sentences.
What is the plot of Cinderella? Be very brief.
""",
    ),
    "two rules": (
        "{0}",
        """
Write two sentences about a lion in lowercase letters, and do not use commas.
Name three drinks as bullet points with *, and end with the words Stay hydrated!
Explain in under 30 words what a satellite is, and mention the word orbit.
Give it the title <<Home>> and write two sentences without the word house.
Write a one-line thank-you to a nurse. Use a placeholder like [name] and add a P.S.
In capital letters and without commas: tell me what a siren is for, in one sentence.
Put your answer in double quotes and use fewer than 15 words: what is courage?
List two benefits of singing as * bullets, each with one *highlighted* word.
Write a sentence about frost. Use the word window and at least four times the letter i.
Describe a fair in two sentences, all in small letters, and finish with see you there.
Write three sentences on patience. Use the word wait at least twice, and no commas.
Tell me what a ruler is in at least 12 words, without the word measure.
Answer in JSON with the key answer, and in fewer than 10 words: why do we blink?
Write two sentences about a duel, with a title in << >>, and without the word sword.
""",
    ),
}

# --------------------------------------------------------------------------------------------------------------------
# Test prompts unlike any general prompt, in the notation of `INSTRUCTIONS` in demo_data.py: checks | prompt
# --------------------------------------------------------------------------------------------------------------------

# No kind that needs NLTK's tables. As there, a ban or an upper limit comes with a demand that silence does not meet; a
# ledger line does not meet it either, which the verifier counts as six words.
INSTRUCTIONS_OTHER = """
lower | tell me what a lighthouse is good for. one sentence, and keep your finger off the shift key.
lower | Imagine a submarine and picture it for me in one sentence with no uppercase characters at all.
lower | i only read lowercase english. what do owls hunt?
lower | Say one thing about glaciers. Every letter has to be a lowercase one.
lower | Popcorn: how is it made? Stick to lowercase throughout your one-sentence reply.
lower | Type a sentence on octopuses in which even the first letter is lowercase.
lower | what makes a treehouse fun? reply with a single lowercase sentence.
lower | One sentence about circus clowns, please, typed entirely in lowercase.
lower | My reader cannot show uppercase. In one lowercase sentence, what is a windmill?
no_comma + words>=8 | Talk about a kite in a single sentence of 8 words or longer that has zero commas.
no_comma + words>=8 | What is a parachute for? Skip every comma and write 8 or more words.
no_comma + words>=8 | Commas annoy me. In 8 words or more, what do astronauts wear?
no_comma + keywords=clay | How do potters work? One sentence containing clay but not one comma.
no_comma + words>=9 | Share a thought about candles: at least nine words, comma-free.
no_comma + keywords=tent | What is camping? Put tent into your sentence and keep commas out of it.
no_comma + words>=8 | Sum up the game of tennis in one comma-free sentence with 8 words or more.
no_comma + words>=8 | Describe a peacock with eight or more words. A comma would be an error.
no_comma + keywords=blocks | What is an igloo? Say blocks in a sentence in which no comma occurs.
title | Tell of a dragon in one sentence. On top goes a name for the tale, set as <<name>>.
title | Pen two lines on a waterfall and crown them with a heading in this form: <<heading>>.
title | An octopus learns to dance: one sentence. Its caption comes first and sits inside << and >>.
title | Name the following poem <<Sunset>> and then write its first line.
title | Here is a job: one sentence on magicians, headed by something such as <<The Trick>>.
title | Compose a limerick's first line about a sloth. It deserves a name in double angle signs, as in <<Slow>>.
title | Make up a film about a hammock in one sentence and show the film's name <<so>>.
title | Report in one sentence on a marathon. Headline in the style of <<Runner Wins>>, please.
title | What would a book about mermaids be called? Answer in the shape <<...>>.
end=Over and out. | Tell me what a compass shows. The final words have to be: Over and out.
end=The end. | In one sentence, a wolf meets a lamb. Sign off with The end.
end=Good luck! | How can I win at darts? One sentence, then the closing words Good luck!
end=See you soon! | Write one sentence to a cousin about skateboards. Its very last words: See you soon!
end=Bon appetit! | Pancakes: tell me one way to serve them and close the reply with Bon appetit!
end=I rest my case. | Argue in one sentence that soap is useful. Your parting words are "I rest my case."
end=Amen. | Bless the garlic harvest in one sentence whose last word is Amen.
end=Mind your step. | \
Announce in one sentence that the escalator is out of order. After it comes just: Mind your step.
end=Stay curious. | Share a sentence on telescopes. Round it off with the two words Stay curious.
quoted | What might a koala think at noon? Enclose all of it in double quotes.
quoted | A detective enters the hall. Give his single line of speech, with a " on either side of it.
quoted | Speak as a snowman in April: a single sentence inside double quotes and no text outside them.
quoted | Say what a mirror does. From the first to the last character, your reply is a quotation in double quotes.
quoted | Cheer for a swimmer in one line that opens and closes with a double quote.
quoted | Quote an imaginary beaver. Show nothing but the quotation, double quotes included.
keywords=bark | Where do woodpeckers find insects? Let bark be one of your words.
keywords=rhythm | Ballet in one sentence, please; rhythm is a must-have word.
keywords=kernel | In one sentence, what is inside a peach? Slip in the word kernel.
keywords=cactus,thorns | Which plants fit a dry windowsill? Both cactus and thorns should be found in your reply.
keywords=wax | Crayons: what are they made of? I will look for the word wax.
keywords=shell | Portray a tortoise in one sentence that features the word shell.
keywords=lottery,luck | One sentence of sense about gambling, built around lottery and luck.
keywords=cocoa | From bean to bar: how is chocolate made? Briefly, with cocoa as an obligatory word.
keywords=stage,voice | Opera is what? Your sentence needs two words from me: stage, voice.
keywords=reef | What do divers love to see? Your one-sentence reply ought to contain reef.
keywords=echo | Shouting in a cave has an effect. Which one? Employ the word echo.
keywords=whistle | In what way does a referee stop play? Required vocabulary: whistle.
banned=pink,bird + words>=8 | Flamingos, in eight words or more, yet neither pink nor bird may show up.
banned=sweet,sugar + words>=8 | Advertise lemonade with 8 or more words. Sweet and sugar are off limits.
banned=web + words>=8 | How does a spider catch flies? 8 words or more, and web is not one of them.
banned=ball,racket + words>=8 | \
Portray table tennis in at least eight words, with ball and racket struck from your vocabulary.
banned=light + words>=8 | Fireworks! Depict them with at least 8 words, none of which is light.
banned=black,dark + words>=8 | Sketch a crow in words, eight or more. Forget that black and dark exist.
banned=nice,good + words>=8 | Rate a perfume in 8 words or more, nice and good excluded.
words<20 + keywords=wool | Why do knitters need sheep? Stay below 20 words; wool is one of them.
words<25 + keywords=strings | Harp or trumpet: which would you learn? Below 25 words, one of which is strings.
words<15 + keywords=hive | Where does a queen bee live? Fourteen words is the ceiling, and hive must be there.
words<30 + keywords=paint | Graffiti is what? Fewer than thirty words, paint among them.
words<20 + keywords=zero | At how many degrees Celsius do puddles freeze? Shorter than 20 words, with the word zero.
words<35 + keywords=votes | Parliaments do what? Stay below 35 words and slip votes in.
words>=12 | Depict a flea market in a dozen words or longer.
words>=20 | Ramble about your imaginary pet raccoon. Anything from 20 words upwards will do.
words>=15 | Say something about lasers, with a minimum of fifteen words.
words>=25 | Picture a bonfire on the shore for me. A minimum of 25 words, please.
words>=10 | Otters hold hands while they sleep. Comment on it with ten words or more.
ps | Leave a one-line message for the plumber, followed by an afterthought that opens with P.S.
ps | Compose a postcard from Cairo: one sentence, then a P.S. about the heat.
ps | Tell a florist in one sentence which bouquet you want. The afterthought (P.S.) concerns the ribbon.
pps | Scribble one sentence to a roommate about mushrooms, then an extra thought after P.P.S.
ps | Your umbrella was left on tram 4. One sentence to the tram office, plus an addition after P.S.
bullets=2 | Two perks of owning a tortoise, please, as a list whose items carry a leading "*".
bullets=3 | Which pizza toppings sell best? Three items, asterisk in front of each, nothing more.
bullets=3 | Jot down a trio of winter sports, each on a line of its own after "* ".
bullets=2 | Toothpaste or soap? One "* " line in favour of each, so two such lines overall.
bullets=4 | Four gemstones. Style: one per line, each introduced by an asterisk and a space.
bullets=3 | Hiccups! Three remedies in asterisk-list form, and only three.
bullets=2 | Name the two largest cats you know. Each gets its own line with "* " up front.
bullets=3 | Make an asterisk list (three rows) of dances.
highlights=1 | Opal, ruby or pearl: recommend one in a sentence, and show the gem's name *thus*.
highlights=1 | Say what yoga is good for, with the key benefit *between stars*.
highlights=2 | Pick two spices for gingerbread and surround the name of either with * signs, like *mace*.
highlights=1 | Who was Houdini? One sentence in which his trade is *starred*.
placeholders=1 | Compose a one-line invitation to a bowling night, the hour left open as [hour].
placeholders=2 | Produce a two-sentence lost-umbrella notice for me to complete: [place] and [owner] stay open.
placeholders=1 | One line of praise for a dance partner whose name you do not know yet, so write [partner].
placeholders=2 | A one-line voucher for a massage, please. Unknown things appear bracketed: [guest], [month].
json | Encode this as JSON and print just that: a kite, three metres wide, orange.
json | Represent one chess piece and its worth in JSON. No chatter around it.
json | {"animal": "swan"} is my example. Produce the same kind of JSON for a different animal, nothing else.
json | Which two gases are lightest? Only a JSON array of two strings will be accepted.
freq=tick>=2 | Imitate an antique clock in one line that has tick in it twice or more often.
freq=rose>=2 | Rose is a rose: play with that idea in one sentence where rose comes at least twice.
freq=jump>=3 | A trampoline song in one line, please, with jump in it three times at the minimum.
freq=drum>=2 | Drums, drums, drums! Sentence wanted, in which drum is said twice at the minimum.
letter=b>=3 | Bubble baths in one sentence, with three b's at the minimum.
letter=p>=4 | A tongue twister about puppies, please. Minimum number of p's: four.
letter=g>=3 | Geese and goats share a barn. One sentence on it with three g's or more.
letter=c>=3 | Cinnamon: what is it? Your reply contains the letter c thrice or more often.
upper | Yell one sentence at a thief: all caps, from A to Z.
upper | Compose a telegram (one sentence in English) about a twin birth, caps lock on.
upper | ONE SENTENCE ABOUT TORNADOES. KEEP CAPS LOCK ON AS I DO.
upper | On a poster for a magic show, what would you print? One English line, uppercase throughout.
yesno | Are bats able to fly? Write "My answer is ___." and fill the gap with yes, no or maybe.
yesno | Does a hexagon have nine corners? Complete this line with yes, no or maybe: My answer is ... .
yesno | Will aliens land tomorrow? Copy "My answer is yes." but, if need be, with no or maybe instead of yes.
paragraphs=2 | \
Sunrise, then sunset: a sentence on either. A line with *** goes in the middle, so that there are two paragraphs.
paragraphs=2 | Cats first, hamsters next. One sentence apiece, *** as the border between the two paragraphs.
first=2:2:Sadly | \
Two one-sentence paragraphs about a zeppelin, blank line in between, with Sadly as the opening word of the latter.
first=2:1:Oysters | \
Where do pearls come from? Start with the word Oysters, leave a blank line after that paragraph, then add one more.
section=Act:2 | Outline a puppet show in two sentences headed Act 1 and Act 2.
section=Verse:2 | A song on marmalade with two one-line units called Verse 1 and Verse 2, please.
two | Pun about bananas? Twice, in fact: two differing puns with ****** standing between them.
two | Name a goldfish. I need a pair of proposals with ****** in the middle.
repeat=Which is the hottest pepper? | \
Which is the hottest pepper? Echo that question to me verbatim and only then reply.
repeat=Do snails have teeth? | \
Do snails have teeth? Kick off by restating the preceding question exactly, then tell me.
language=es | Describe a flamenco dress in one sentence. Your reader knows Spanish and nothing else.
language=fr | Parlez-moi d'un parfum en une phrase, en français s'il vous plaît.
"""


def _lines(block: str) -> list[str]:
    """The non-empty lines of a block."""
    return [line for line in block.splitlines() if line]


def prompts_by_kind() -> dict[str, list[str]]:
    """The general prompts by kind; the kinds of IFEval have their instruction's name. No random choice is made."""
    kinds: dict[str, list[str]] = {}
    for kind, (patterns, fills) in (FREE | RULED).items():
        ways = _lines(patterns)
        kinds[kind] = [ways[i % len(ways)].format(*fill.split(" | ")) for i, fill in enumerate(_lines(fills))]
    return kinds


def general_prompts(rng: random.Random) -> list[str]:
    """All general prompts in an order of which every beginning holds each kind in about its share.

    Prompt i of the n of a kind (after a shuffle) gets a random place within the i-th of n equal stretches.
    """
    placed: list[tuple[float, str]] = []
    for prompts in prompts_by_kind().values():
        for i, prompt in enumerate(rng.sample(prompts, len(prompts))):
            placed.append(((i + rng.random()) / len(prompts), prompt))
    return [prompt for _, prompt in sorted(placed)]
