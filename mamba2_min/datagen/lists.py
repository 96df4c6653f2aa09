"""What the built-in prompts are drawn from: plain lists, to be read, changed and added to.

A model that is asked a hundred times for "a story" writes much the same one a hundred times. What makes a set worth
training on is in these lists: concrete words that have to be woven in, people with a trouble of their own, places with
weather, and above all openings, since those are where a model falls back on its habits first.
"""

from __future__ import annotations


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.strip().splitlines())


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


WORDS = _words("""
    acorn almanac amber anchor anthem anvil apricot apron arch argue ash attic avalanche axle badger bagpipe balcony
    bandage banister barley barter basin bell bellows bicycle birch blanket blizzard boast boat borrow bottle bread
    brick bridge brittle bruise bucket burrow butter button cabbage camel candle canoe canvas carve cello chalk chapel
    chimney chisel cider cinnamon clay clerk cliff clock clover coal coin comet compass copper coral cork cradle crane
    crooked crow crumb cuckoo curtain cushion dawdle debt diary dice ditch donkey door doubt dough drawer drift drum
    dune dusk earring echo eel ember engine envelope errand fable fathom feather fence fern ferry festival fiddle fig
    flannel flicker flint flood flour flute fog footprint forge forgive fountain fox freight frost funnel gallop garlic
    gate ghost ginger glacier glass glove goat grain grammar gravel grease gull hail hammer harbour hatch hay hazel
    hedge heirloom herring hesitate hinge hive honest honey hook hum hush ice ink invoice island itch ivory jar jealous
    jetty jigsaw juniper kettle kite kneel knit knot label lace ladder lantern latch leak ledger lemon lever lichen
    lightning limp linen locksmith loom loyal lullaby magnet maple marble margin market mask mast meadow mend meteor
    mill mimic mirror mischief mitten molasses moss moth mule murmur mushroom needle nephew nettle nickname nod notch
    nutmeg oar oath olive onion orbit orchard otter oven owl oyster paddle parcel parrot passport patch peat pebble
    pepper pier pigeon pillow plank plough plum pocket polish pond porridge postcard potato promise puddle pulley
    pumpkin puzzle quarrel quarry quilt radio raft rain raspberry rattle reckless reed refuse rehearsal ribbon riddle
    rival rope rust saddle sail salt sandal satchel scaffold scar scarf scribble seed sew shadow shears shell shiver
    shovel shrug signal silt siren skate sled sleeve sling smuggle snail soap soot spade sparrow spice spider splinter
    spoon staircase stamp stammer starling stew stitch stool storm stove straw stubborn stumble sugar suitcase sunrise
    swap swarm sweat syrup tangle tar teapot tent thaw thimble thistle thread thunder ticket tide timber tin toad torch
    tower trade trellis tremble trumpet trust tunnel turnip twine umbrella valve varnish velvet vinegar violin volcano
    vote waltz warning wasp weave wheel whisker whisper whistle willow windmill wink winter wire witness wobble wolf
    wool wreck wrench yawn yeast zipper
""")

NAMES = _words("""
    Abena Adil Agnieszka Aino Akira Alba Alejandro Amara Amina Anders Anjali Anouk Ansel Aoife Arjun Asel Astrid Ayumi
    Babak Bao Beatriz Benoit Birgit Bogdan Branwen Bruno Caspian Catalina Chidi Ciaran Clara Cosmo Dagny Dalia Darko
    Delphine Demir Desta Dinah Ebba Edwin Efua Eino Elif Elio Emeka Enzo Esperanza Esther Fadi Fatou Felix Fenna Fergus
    Fumiko Gael Gideon Giulia Greta Gustavo Hakim Hana Haruki Hedda Hektor Hilde Ibrahim Idris Ines Ingrid Isak Ismail
    Itzel Ivo Jabari Jana Jarek Joaquin Jomo Jonas Josefa Juri Kaia Kamal Katya Keiko Kenji Khadija Kiran Kofi Lars
    Laszlo Leena Leonor Linh Lorcan Lourdes Luca Ludmila Mabel Magnus Makena Malik Marguerite Mateo Matilda Mehmet
    Meera Mihai Milena Mirela Moses Nadia Nahuel Naoko Narges Nicanor Niels Nkechi Noor Oana Odile Olek Omar Orla Otto
    Paloma Pavel Pedro Petra Pilar Piotr Priya Quentin Rafael Rania Ravi Renske Rhys Rosa Ruben Rufus Sabine Salma
    Samuel Sanna Saoirse Selim Senait Shirin Silvio Simone Soren Stellan Sunniva Tadeo Takumi Tamar Tariq Tevita Thandi
    Theo Tiago Tilda Tomas Tuan Ursula Vasco Vera Viktor Wanda Wei Wilhelmina Xavier Xenia Yara Yasmin Yusuf Zainab
    Zanele Zofia Zoltan
""")

THEMES = _lines("""
    the cost of keeping a promise
    forgiving someone who has not asked for it
    a small lie that grows
    learning a craft from someone impatient
    what is owed to neighbours
    being wrong in front of everybody
    the pride of doing plain work well
    a debt that cannot be paid in money
    growing up faster than a friend
    coming home and finding it changed
    courage that nobody sees
    jealousy between two people who love each other
    telling the truth too late
    letting go of a thing that once saved you
    the difference between being alone and being lonely
    a kindness that is refused
    inheriting a quarrel
    asking for help
    a rule that has outlived its reason
    loyalty to two sides
    grief that turns into work
    finding out that a hero is ordinary
    the first time of being trusted
    the last time of doing something
    mistaking politeness for love
    luck, and who gets the credit for it
    patience rewarded in an unexpected way
    a rivalry that becomes a friendship
    old age seen by a child
    childhood seen by someone old
    hunger and hospitality
    taking the blame for another
    choosing which of two good things to lose
    curiosity that goes one step too far
    making peace with one's own body
    a stranger who is taken for someone else
    remembering the same day differently
    the temptation to look away
    being underestimated
    a gift that is a burden
    language that fails, and what is done instead
    leaving before the end
    staying when it would be easier to go
    the pleasure of solving something
    a mistake that turns out useful
    fear of the dark, of water, or of other people
    the work of repairing what somebody else broke
    secrets between parents and children
    the dignity of animals
    what money changes
    a place that is about to vanish
    winning, and not liking it
    the comfort of habit
    standing up to a crowd
    the moment before a decision
    jokes as a way of saying serious things
""")

CHARACTERS = _lines("""
    a lighthouse keeper who is afraid of the sea
    a baker who has lost the sense of taste
    a night-bus driver in the last week before retirement
    a child of ten who repairs radios
    a retired boxer who keeps bees
    a translator who has begun to mistranslate on purpose
    a young vet on the first night on call
    a pensioner learning to ride a bicycle
    a piano tuner who is going deaf
    a clerk in an office of lost property
    a twin who has not spoken to the other for a year
    a mapmaker who has never travelled
    a child who collects the names of winds
    a midwife with a bad temper
    a bridge inspector who counts everything
    a cook on a cargo ship
    an old cabinetmaker who talks to the tools
    a bored heir to a throne who would like to be a gardener
    a thief who returns things
    a school caretaker who writes letters for others
    a beekeeper accused of witchcraft
    a very old tortoise with a good memory
    a robot that sorts waste and keeps what it finds beautiful
    a dressmaker who hides messages in hems
    a football referee whom nobody thanks
    a glassblower with shaking hands
    an astronomer who is tired of the sky
    a ferryman who never asks where people are going
    a child who has stopped speaking
    a watchmaker who is always late
    a botanist searching for one particular weed
    a fox that has grown used to people
    a fortune teller who does not believe in it
    a mountain guide who has lost a client
    an apprentice who is better than the master
    a shepherd with a telephone that rings at odd hours
    a judge on a day off
    a new teacher in a school with eleven pupils
    a clumsy magician hired for a funeral
    a soldier walking home after a war
    a puppeteer whose favourite puppet is missing
    a librarian in a village without readers
    a diver who repairs harbour walls
    a parent of four who has one free hour
    a gravedigger who is cheerful by nature
    an heir to a house full of clocks
    a dog that belongs to a whole street
    a chemist who has bottled a smell from childhood
    a weather forecaster who was badly wrong
    a nurse on a ward at night
    a tailor who can guess what people are hiding
    a crane driver who sees everything from above
    a mayor of a very small town
    a violinist who plays in the underground
    a farmer whose field holds something buried
    an engineer who happens to be of royal blood
    a crow that pays its debts
    an exchange student who understands one word in three
    a stonemason working on a church that will take a century
    an interpreter at the border
    a stationmaster where no train stops any more
    a champion of a game that nobody plays now
    a blind painter's assistant
    a goat thief with a conscience
    a detective who dislikes mysteries
    a giant who wants a quiet life
""")

PLACES = _lines("""
    in a harbour town in the week of the first ice
    on a mountain pass where the road has been washed away
    in a block of flats during a power cut
    on an island with more goats than people
    in the kitchen of a large hotel
    on a river barge loaded with onions
    in a border town with two names
    at a weather station in the far north
    in a desert village on the day the well runs dry
    in a theatre an hour before the curtain rises
    on a night train that has stopped between stations
    in an orchard at harvest
    at a market under the arches of a railway
    in the basement of a museum
    on a small farm after a flood
    in a city built on stilts
    in a lighthouse during a storm
    at a petrol station on an empty road
    in a monastery that makes cheese
    in a fishing village that has lost its fish
    on board a ship between two stars
    in a hospital corridor at four in the morning
    at a school on the last day before the holidays
    in a walled garden in a hot summer
    in a mining town after the mine has closed
    in a courtroom on a slow afternoon
    at a wedding where the band has not arrived
    in a laundry in a crowded quarter
    in a valley where sound carries for miles
    at a bus stop in heavy rain
    in the workshop of a bell founder
    in a library on wheels
    on a salt flat under a full moon
    in a palace that is slowly sinking
    in a snowed-in mountain hut
    in an underground city where nobody has seen the sun
    at a crossroads inn two hundred years ago
    in a greenhouse on Mars
    in a toy shop after closing time
    at an airport where every flight is delayed
    in a tea plantation in the mist
    on a rooftop with pigeons
    in a printing house on the night of an election
    in a swamp that is said to move
    at a repair shop for bicycles
    in a town where it has rained for a month
    on the longest bridge in the country
    in a vineyard the morning after a hailstorm
    at a fair on the edge of town
    in an observatory that is being pulled down
    in a bakery before sunrise
    on a glacier that is giving things back
    in a caravan by the sea out of season
    in a forest of very old trees
    in a street that is on no map
    at a ferry landing in autumn
    in an attic above a music school
    at the court of a queen who cannot sleep
    in a village that speaks in whistles
    in a swimming pool that has been drained
    in a canyon with an echo that answers late
    on a tram on its last day of service
""")

STYLES = _lines("""
    spare and exact, in short sentences
    warm and unhurried, like someone talking at a kitchen table
    dry and ironic, with a straight face
    like a folk tale, without naming a year
    for children of six, with simple words and some repetition
    for children of ten, brisk and funny
    tense, with every paragraph shorter than the one before
    quiet, with much left unsaid
    rich in smells and sounds, poor in adjectives
    mostly in dialogue
    like a newspaper report that slowly becomes personal
    in long, winding sentences
    comic, with things going wrong one after another
    like a ghost story in which nothing supernatural happens
    matter-of-fact about something impossible
    like a fable, with animals and no moral spelled out
    like a memory, with gaps
    as a detective story in miniature
    as an adventure, with much movement
    as science fiction about ordinary people
    melancholy, with one joke
    precise about tools and handiwork
    with a narrator who cannot be trusted
    like a tall tale told in a tavern
    plain, in words of one or two syllables as far as possible
    tender, without sentimentality
    with a calm voice and a frightening event
    as a story inside a story
    in scenes, with sharp cuts between them
""")

OPENINGS = _lines("""
    Begin in the middle of an argument.
    Open with a line of dialogue that is a question.
    Open with a line of dialogue that is plainly a lie.
    Begin with a sound.
    Begin with a smell, before anything is seen.
    Begin with somebody's hands at work.
    Begin with the price of something.
    Begin at the moment when something breaks.
    Begin with a list of three objects.
    Begin with a rule that everybody in this place knows.
    Begin with the last thing that happened, then go back.
    Begin with a short sentence of no more than four words.
    Begin with a long sentence that does not stop for breath.
    Begin with a letter or note, quoted.
    Begin with what somebody did not say.
    Begin with a door.
    Begin with a number.
    Begin with an animal doing something unusual.
    Begin with a mistake.
    Begin with the name of the main character, and what other people call them.
    Begin with a piece of advice that turns out to be bad.
    Begin with somebody waiting.
    Begin with a meal.
    Begin with a rumour.
    Begin with what was missing that morning.
    Begin with an instruction, as in a manual.
    Begin with a memory that is corrected at once.
    Begin with something falling.
    Begin with a bet.
    Begin with someone arriving too early.
    Begin with someone leaving without a word.
    Begin with a conversation overheard.
    Begin with a complaint.
    Begin with a small ceremony or habit.
    Begin by naming the exact time, and why it matters.
    Begin with a piece of clothing.
    Begin with a promise being made.
    Begin with a description of the ground underfoot.
    Begin with laughter at the wrong moment.
    Begin with an exclamation from a minor character.
    Begin with a comparison that only this character would make.
    Begin with a task half finished.
    Begin with a warning.
    Begin with the second-best day of somebody's life.
    Begin by contradicting a proverb.
    Begin with somebody counting.
""")

ENDINGS = _lines("""
    End on an image, not on a lesson.
    End with a line of dialogue.
    End a moment earlier than the reader expects.
    End with something small being given back.
    Let the ending be happy, but let it cost something.
    Let the ending be sad, but not hopeless.
    Let the ending turn on one of the objects mentioned before.
    End with a decision.
    End with a joke.
    End where the story began, with one thing changed.
    Leave one question open.
    End with somebody else's point of view.
""")

VIEWS = _lines("""
    Tell it in the first person and the past tense.
    Tell it in the first person and the present tense.
    Tell it in the third person and the past tense.
    Tell it in the third person and the present tense.
    Tell it in the third person and the past tense, close to one person's thoughts.
    Tell it as "we", in the voice of the people of the place.
    Tell it in the first person, in the voice of somebody who only looks on.
""")

LENGTHS = ("150", "200", "250", "300", "350", "400", "500", "600")

SUBJECTS = _lines("""
    why the sky is blue and sunsets are red
    how bread rises
    how a lock and key work
    what inflation is
    how vaccines teach the body
    why ice floats
    how a sailing boat moves against the wind
    what a prime number is
    how bees decide where to live
    why we have leap years
    how a refrigerator makes cold
    what happens in the body during sleep
    how maps distort the world
    why bridges have expansion joints
    how a sewing machine makes a stitch
    what makes an echo
    how coral reefs grow
    why metals rust and gold does not
    how elections with several rounds work
    what a loan's interest really pays for
    how a piano makes its sound
    why onions make us cry
    how trees move water upwards
    what DNA does
    how a camera focuses
    why the moon shows one face
    how soap cleans
    what a contract is
    how rumours spread
    why bicycles stay upright
    how an aeroplane stays in the air
    what a black hole is
    how compost becomes soil
    why languages change
    how a computer stores a letter of the alphabet
    what an average hides
    how volcanoes differ from one another
    why cats land on their feet
    how paper is made
    what the immune system remembers
    how tides come about
    why some materials conduct electricity
    how a courtroom trial proceeds
    what photosynthesis makes, and from what
    how a search engine finds a page
    why glass is transparent
    how migrating birds find the way
    what a shadow bank is, in plain words
    how a violin is tuned
    why deserts are cold at night
    how a zip fastener works
    what probability says about dice
    how cheese gets its holes
    why knots hold
    how a lighthouse lens throws its beam so far
    what makes a good question
    how earthquakes are measured
    why stars twinkle and planets do not
    how a recipe can be scaled to more people
    what a species is
    how ships pass through a canal lock
    why we yawn
    how a password can be checked without being stored
    what gravity does to time
    how a beaver dam changes a valley
    why coins have ridged edges
    how a steam engine turns heat into motion
    what happens to a letter after it is posted
    how the seasons come about
    why popcorn pops
    how a watch keeps time
    what a placebo is
    how rivers bend
    why batteries run down
    how a choir stays in tune
    what supply and demand mean in a street market
    how to read a weather map
    why mirrors swap left and right but not up and down
    how a seed knows which way is up
    what an algorithm is
    how glue sticks
    why salt keeps food from spoiling
    how a museum restores a painting
    what infinity means to a mathematician
    how a parachute slows a fall
    why fingers wrinkle in water
    how fire spreads, and how it is stopped
    what a metaphor does
    how an orchestra follows its conductor
    why some colours clash
    how a bill becomes a law
    what causes fog
    how thermometers work
    why the sea is salty
    how memory can be trained
    what friction is good for
    how a loom makes cloth
    why ants walk in lines
    how clocks were set before there was radio
    what makes concrete hard
    how a dictionary is written
    why bubbles are round
    how an elevator knows when to stop
    what a budget is for
    how animals hibernate
    why rainbows are bows
    how a microscope enlarges
    what symbiosis is
    how chess programs choose a move
    why old houses creak
    how a vending machine recognises a coin
    what a scientific theory is
    how snow becomes an avalanche
    why a whip cracks
    how trade winds shaped routes at sea
    what makes a poem a poem
    how a telescope gathers light
    why people once thought that the sun moves
    how blood carries oxygen
    what a patent protects
""")

AUDIENCES = _lines("""
    a curious child of eight
    a teenager who finds the subject dull
    a grandparent who likes to take things apart
    a cook with no time
    an engineer from another field
    a new colleague on the first day
    somebody who believes the common misunderstanding
    a traveller sitting in the next seat
    a class of twelve-year-olds
    a farmer with long practical experience
    a novelist who needs the details to be right
    a friend on a long walk
    someone who has only five minutes
    an adult who was told at school that it was too hard
    a student before an examination
    a carpenter
    a nurse
    a musician
    a visitor to a museum
    a person who learns best from examples
""")

ANGLES = _lines("""
    through one everyday comparison, carried all the way through
    step by step, each step following from the one before
    by starting from a common mistake and mending it
    by following one small thing from beginning to end
    by telling how people found it out
    through an experiment that can be done at home
    by answering the three questions that a beginner asks
    by saying first what it is not
    through a short scene between two people
    by comparing two cases that look alike and differ
    from the large to the small
    from the small to the large
    with numbers, rounded so that they can be remembered
    by asking what would happen without it
    as an exact description, without any comparison
    by naming causes first and effects afterwards
    by naming the effect first and looking for its causes
    with one surprising fact, properly explained
    in the form of questions and answers
    by describing what one would see, hear or feel
""")

EXPLANATION_OPENINGS = _lines("""
    Begin with a question that the reader may have asked.
    Begin with the answer in one sentence.
    Begin with a scene from a kitchen, a workshop or a street.
    Begin with the most common wrong idea.
    Begin with an object that the reader can hold.
    Begin with a number.
    Begin with something to try at once.
    Begin with a short definition in plain words.
    Begin with the problem that somebody wanted to solve.
    Begin with a contrast between two things.
    Begin with the word itself, and where it comes from.
    Begin with what happens in the first second.
    Begin in the middle of the explanation, as if it had already been going on for a minute.
    Begin with what goes wrong when it is missing.
    Begin with an example, and name the general rule only later.
    Begin with a person at work.
    Begin with what can be seen from a window.
    Begin with the surprising part.
    Begin with the simplest case there is.
    Begin with a disagreement between two people who both have a point.
    Begin with the history in one sentence.
    Begin with an instruction: look at, listen to, or touch something.
""")

SPEAKERS = _lines("""
    a parent and a grown-up child
    two old friends who have not met for ten years
    a customer and a stubborn shop assistant
    a teacher and a pupil who is cleverer than expected
    a taxi driver and a passenger in a hurry
    two cousins clearing out a house
    a doctor and a patient who looked everything up
    a landlord and a tenant
    a chess champion and a child
    two strangers who have to wait together
    a cook and an apprentice
    a police officer and a very honest witness
    a grandparent and a grandchild
    two actors before an audition
    a captain and the ship's engineer
    an inventor and a banker
    a barber and a regular customer
    two neighbours on either side of a hedge
    a librarian and a reader with overdue books
    a tourist and a local who gives directions
    a carpenter and the owner of a crooked house
    two scientists who read the same result differently
    a couple assembling a wardrobe
    a night porter and a guest who cannot sleep
    a journalist and a mayor
    a coach and an athlete after a defeat
    two thieves who meet in the same dark house
    a farmer and a city child
    an immigrant and a clerk at a counter
    a robot and the person who is to switch it off
    a composer and a tired violinist
    two people an hour before they marry each other
    a ghost and the new owner of the house
    the ruler of a small country and a gardener
    two drivers after a small accident
    a translator and the poet who is being translated
    an apprentice and a master who is about to retire
    a mechanic and the owner of a very old car
    a student and a professor who has forgotten the appointment
    two sailors on watch
    a fortune teller and a sceptic
    a beekeeper and an allergic neighbour
""")

MATTERS = _lines("""
    a borrowed thing that was not returned
    whether to sell the house
    a recipe that one of them will not share
    a misunderstanding about a date
    a secret that both of them know
    which way is shorter
    an apology that is overdue
    a dog that has run away
    how much a thing is worth
    a plan that sounds foolish and may work
    a letter that arrived years late
    who is to blame for the leak
    a dream that one of them takes seriously
    the right way to hold a tool
    a job offer in another country
    a song that neither of them can remember fully
    an inheritance of no value
    whether it is going to rain
    a photograph with an unknown person in it
    a fear that one of them hides
    a bet made long ago
    a mistake in the accounts
    why one of them is leaving
    the name for something
    a noise that only one of them hears
    what to do with a found purse
    a question about the stars
    the last piece of cake
    a lie told out of kindness
    the meaning of a painting
    the best way to say no
    a friend in trouble
    a rule that makes no sense
    a present for somebody difficult
    how to begin a speech
    whether animals are happy
    a machine that will not start
    a promise that can no longer be kept
    what one of them would do with a year of free time
    an old injury
""")

MOMENTS = _lines("""
    late at night
    on the first cold morning of the year
    while the power is out
    while it rains without end
    with only ten minutes left
    on a very hot afternoon
    at the end of a long day
    on a public holiday
    while something is being repaired next door
    during the first snow
    over a pot of tea that has gone cold
    while both of them are busy with their hands
    in a fog so thick that nothing can be seen
    at daybreak, both of them tired
    just after a loud noise
    while waiting for somebody else
    in whispers, since somebody is asleep near by
    while a procession goes by outside
    on the day after a storm
    at a table with one chair too few
    after a long silence between them
    while it grows dark and nobody puts on a light
    in the last hour before a departure
    on the telephone, over a bad line
""")

TURNS = _lines("""
    In the course of it they change sides.
    Halfway through, one of them says something that cannot be taken back.
    It is funny, though neither of them means it to be.
    They reach an agreement that neither had in mind at the start.
    One of them is hiding something, and the reader notices before the other does.
    It grows quieter and more honest towards the end.
    They talk past each other until one plain sentence clears it up.
    One of them learns something useful, exactly explained.
    A third person interrupts once.
    It ends without agreement, and with respect.
    It turns out that they were talking about different things.
    They finish by laughing.
    One of them asks questions only.
    The one who seemed weaker has the last word.
    They are interrupted before the end by an event.
    It moves from small talk to what matters.
""")

DIALOGUE_OPENINGS = _lines("""
    The first speech is a question.
    The first speech is an accusation.
    The first speech is an answer to something the reader has not heard.
    The first speech is a single word.
    The first speech is an apology.
    The first speech is about something one of them holds in the hand.
    The first speech is a refusal.
    The first speech is about a sound or a smell.
    The first speech is a number or a price.
    The first speech is an order.
    The first speech is the end of a longer story.
    The first speech is a compliment that goes wrong.
    The first speech is a guess.
    The first speech is a confession.
    The first speech is a complaint about the weather, and not really about the weather.
    The first speech is a greeting that only these two would use.
    The first speech corrects a mistake.
    The first speech is an offer.
    The first speech is a warning.
    The first speech repeats what the other one just said.
""")

WRITERS = _lines("""
    a lighthouse keeper
    a student in a foreign city
    a soldier far from home
    a retired teacher
    a child of nine
    an emigrant after the first year
    a ship's doctor
    a proud inventor
    a parent whose children have left
    an apprentice baker
    a scientist at a polar station
    a prisoner who has learned to read
    an unsuccessful poet
    a farmer in a dry year
    a shop owner
    a musician on tour
    a nurse after a night on the ward
    a grandparent who types with one finger
    a new mayor
    a gardener at a large estate
    a witness of something odd
    a friend with bad news
    a friend with good news
    an engineer building a dam
    a tenant on the fifth floor
    a traveller who has lost the luggage
    a novelist with a deadline
    somebody about to be married
    a lodger in an attic room
    an astronaut in the sixth month
    a clockmaker
    a goalkeeper
    a young lawyer
    a shepherd
    a translator
    a volunteer at an animal shelter
""")

RECIPIENTS = _lines("""
    a sister
    an old teacher
    a friend from childhood
    an unknown person who will find it in a bottle
    a former rival
    a grandchild not yet born
    a neighbour
    a first love after forty years
    a younger self
    a cousin who emigrated
    the next tenant of the flat
    a doctor who saved a life
    a father
    a pen friend never met in person
    a business partner
    a favourite author
    a daughter on her first day at work
    an aunt who asks too many questions
    a colleague who left
    a friend in hospital
    a brother after a quarrel
    a stranger who returned a wallet
    a godchild
    a friend who moved to the mountains
    an old comrade
    a former pupil
""")

OCCASIONS = _lines("""
    to say thank you for something that seemed small at the time
    to apologise without making excuses
    to describe a place seen for the first time
    to ask for advice
    to give advice, asked for or not
    to decline an invitation
    to invite to a modest celebration
    to report what happened after a storm
    to admit a secret
    to explain a decision
    to ask for a favour that is hard to ask
    to send a recipe with its story
    to console
    to congratulate, with a little envy
    to settle an old debt
    to say goodbye
    to tell of an ordinary day
    to correct a mistake made in an earlier letter
    to propose a plan
    to ask after news, and give some
    to return an object that was lent
    to describe a new craft and how far it has been learned
    to settle a quarrel about facts
    to warn of something
    to remember somebody who has died
    to ask for a second chance
    to give directions for a journey
    to tell a joke that needs a page
""")

OFFICES = _lines("""
    a landlord
    the editor of a newspaper
    a company that made a faulty kettle
    a bank
    a town council
    a museum
    a railway company
    a judge
    the head of a school
    an insurance office
    a publisher
    the harbour master
    the manager of a theatre
    a hospital's administration
    the post office
    a university
    an orchestra
    a garden society
    the owner of a circus
    a weather service
""")

BUSINESS = _lines("""
    to complain, politely and exactly
    to ask for information, with good reasons
    to recommend a person for a position
    to apply for a position that was not advertised
    to correct an error in a public notice
    to withdraw an earlier complaint
    to suggest an improvement that costs little
    to report something found
    to report something lost
    to thank a member of the staff
    to ask for an extension of a deadline
    to explain an unusual situation
    to decline an offer
    to offer an object for sale, honestly described
    to answer an unjust accusation
    to give notice
    to ask for permission
    to enquire about a letter that never got an answer
""")

TONES = _lines("""
    cheerful and a little scatterbrained
    formal, with feeling showing through once
    plain and honest
    dry and witty
    tender
    angry, and holding it in
    proud of small things
    shy
    full of curiosity
    tired, and kind
    solemn
    full of plans
    regretful
    exact, in the manner of somebody who keeps accounts
    confiding
    mischievous
""")

LETTER_OPENINGS = _lines("""
    After the greeting, begin with what can be seen from the writing table.
    After the greeting, begin with the reason for writing, without any preamble.
    After the greeting, begin with an answer to a question from the other's last letter.
    After the greeting, begin with something that happened an hour ago.
    After the greeting, begin with a confession.
    After the greeting, begin with a memory that both share.
    After the greeting, begin with what is lying in the same envelope.
    After the greeting, begin with the weather, and make it matter.
    After the greeting, begin with an apology for the handwriting, the paper or the delay.
    After the greeting, begin with a question.
    After the greeting, begin with a sentence somebody said.
    After the greeting, begin with a small triumph.
    After the greeting, begin with an object that brought the other to mind.
    After the greeting, begin by contradicting the other.
    After the greeting, begin with the second most important news.
    Begin with the place and date, then the greeting, and then plunge into the middle of things.
""")

DETAILS = _lines("""
    a sum of money
    a kind of tree
    a broken tool
    a meal
    a piece of music
    an animal
    a street name
    a colour
    a train time
    a nickname
    a coat
    a staircase
    a misread word
    a window
    a jar of something
    a photograph
    a pair of shoes
    a telephone call
    a garden bed
    a clock that is wrong
    a smell from childhood
    a borrowed book
    a bruise
    a card game
""")

TASKS = _lines("""
    an explanation
    step-by-step instructions
    a comparison of two options
    advice on a decision
    a short summary
    a list of ideas
    help with finding a mistake
    a rewriting of two sentences, which the request quotes, in plainer words
    an example with numbers
    a plan for a week
    a plan for an afternoon
    a short story for a child
    a polite message to somebody
    arguments for and against
    a definition with an example
    an estimate, with the reasoning shown
    a checklist
    a set of three quiz questions with answers
    the cause of a problem and how to mend it
    a comparison that makes it clear to a beginner
    a description in the manner of a guidebook
    a short dialogue that shows it
    an answer to a child's question
    what to look for when buying
    the most common mistakes and how to avoid them
    a brief history
    a small experiment to try at home
    an opinion with reasons
    a title and a first paragraph for an article
    an explanation of a proverb or a saying that has to do with it
""")

INSTRUCTION_SUBJECTS = _lines("""
    growing tomatoes on a balcony
    sharpening a kitchen knife
    learning a language as an adult
    repairing a bicycle tyre
    fractions
    sleeping better
    saving money on a small income
    the phases of the moon
    writing a letter of complaint
    baking bread with little time
    train travel with children
    the rules of chess
    choosing a used car
    the water cycle
    speaking in front of people
    keeping hens
    simple spreadsheets
    caring for old books
    knitting a scarf
    first aid for burns
    drawing faces
    percentages and discounts
    moving to another city
    a family quarrel about chores
    recycling at home
    walking in the mountains safely
    the parts of a plant
    playing the guitar as a beginner
    making soup from leftovers
    planning a birthday
    reading a map
    computer passwords
    the French Revolution
    training a puppy
    a job interview
    painting a room
    the solar system
    keeping a diary
    magnets
    a school play
    winter clothing
    beekeeping
    volcanoes
    mending clothes
    neighbours who are loud at night
    learning to swim
    a vegetable garden in clay soil
    the history of printing
    estimating large numbers
    weather proverbs
    sorting a list by hand and by program
    a museum visit with teenagers
    fermenting vegetables
    renting a flat
    telling the time by the sun
    electrical safety at home
    negotiating a price
    migrating birds
    poetry for people who do not read poetry
    folding a paper boat
    fog, dew and frost
    a long train of dominoes
    running five kilometres
    the taste of different kinds of tea
    writing a speech for a wedding
    packing a rucksack
    simple machines
    a lost parcel
    community gardens
    the human heart
    a budget for a holiday
    clocks and calendars
    card games for two
    an allergy to cats
    bridges
    dinosaurs
    making friends in a new place
    photography in poor light
    cleaning without strong chemicals
    a leaking tap
""")

ASKERS = _lines("""
    a schoolchild
    a tired parent
    a shop owner
    an apprentice
    a pensioner with plenty of time
    a student before an examination
    a nurse between two shifts
    a farmer
    a person who is new in the country
    a teacher preparing a lesson
    a carpenter
    an office worker
    a club secretary
    a cook
    a worried neighbour
    a hobby gardener
    a bus driver
    a teenager
    a grandmother
    a software developer
    someone who has tried once already and failed
    someone who has only ten minutes
    someone who likes to know exactly
    a sceptic
""")

MANNERS = _lines("""
    It is one plain sentence.
    It is a short question.
    It describes the situation in two sentences and then asks.
    It names one condition that the answer has to respect.
    It is friendly and a little long-winded.
    It is brief, as typed on a telephone, but spelled correctly.
    It gives two or three facts or figures that the answer has to use.
    It says what was tried before.
    It asks for a certain length or form of answer.
    It says for whom the answer is meant.
    It is put as a command.
    It mentions what the asker already knows.
""")
