"""Common English words of four letters and more, for the spelling tasks of spelling.py. Order and content matter: a
row is drawn from this list by its index, so another list is another data set."""

_TEXT = """
ability absence academy accident account achieve acquire address advance adventure advice afternoon agency agreement
airport alarm album alcohol alley almond alphabet altitude amazing ambition anchor ancient animal ankle announce annual
answer antenna anxiety apartment apology appetite apple apricot april arcade archive arena arithmetic armchair arrange
arrival article artist ashamed aspect assembly atlas atmosphere attention attic audience author autumn avenue average
avocado awake award awkward bachelor backpack badge bakery balance balcony balloon bamboo banana bandage banner barrel
basement basket battery beach beaver because bedroom beetle beginning behavior belief bench benefit berry between
bicycle biology birthday biscuit blanket blizzard blossom blueberry board bonfire bookshelf border borrow bottle bottom
boulder boundary bracelet branch breakfast breeze brick bridge brilliant broccoli brother bubble bucket budget buffalo
building bumblebee business butter butterfly button cabbage cabinet cactus calendar camera campaign canal candle
candidate canoe canvas capital captain caravan career carpenter carpet carriage carrot castle cathedral cattle cave
ceiling celebrate cellar century cereal ceremony certain chair challenge champion channel chapter character charcoal
cheese chemistry cherry chicken children chimney chocolate choice church cinema cinnamon circle circus citizen classic
classroom climate clinic clock clothes clover coastal coconut coffee collar colleague collect college comedy comfort
committee common company compass complete computer concert condition confidence connect consider container continent
contract copper corner correct cottage cotton cougar country courage cousin cradle crayon creature cricket critical
crocodile crossing crowd crystal cucumber culture cupboard curious curtain cushion customer dairy damage dancer danger
daughter dawn debate december decide decorate degree delicious delivery democracy dentist deposit desert design detail
develop diamond dictionary difference dinner dinosaur direction disappear discover distance divide doctor document
dolphin domestic donkey doorbell double dragon drawer dream drizzle drought drummer dungeon during eagle early
earthquake easy echo eclipse economy education effect efficient effort eight elbow election electric elegant elephant
elevator eleven embarrass emerald emotion employee empty encourage energy engine enormous enough entrance envelope
environment episode equation equipment escape essay evening evidence examine example excellent exchange exercise
exhibit expensive experience explain explore express fabric factory familiar family famous fantastic farmer fashion
feather february fence festival fiction field fifteen figure finger fireplace fisherman flamingo flavor flight flower
flute follow football forehead forest forget formula fortune forward foundation fountain fragile freedom freezer
frequent friday friend frontier frozen fruit furniture future galaxy gallery garage garden garlic gasoline general
generous gentle geography geometry giraffe glacier glass glimpse globe goldfish goodbye gorilla government graduate
grammar grandmother grape graph grass gravity greenhouse grocery ground guarantee guardian guess guitar habitat hammer
hammock handle happen harbor harvest hazelnut headache healthy heart hedgehog height helicopter hello helmet heritage
hero hesitate highway history holiday honey horizon hospital hotel household hummingbird hundred hungry hurricane
iceberg idea identity illness imagine immediate impossible improve incident include independent industry infant
information injury innocent insect inspire instrument insurance interest interrupt invention invite island jacket
january jealous jelly jewel journal journey judge juggle juice jungle junior justice kangaroo kettle keyboard kidney
kingdom kitchen kitten knee knife knowledge label laboratory ladder language lantern laptop laughter laundry lavender
lawyer leader leather lecture legend lemonade leopard lesson letter lettuce level liberty library license lightning
limestone liquid listen literature little lizard lobster lonely lottery luggage lumber lunch machine magazine magic
magnet mailbox maintain mammal manager mango marathon marble market marriage marvelous material mathematics mattress
meadow measure mechanic medicine medium melody member memory mention merchant message metal method middle midnight
million mineral minimum minute miracle mirror mischief missing mistake mixture modern moment monday monkey monster
morning mosquito mother motor mountain mouse movement muffin multiply muscle museum mushroom music mustard mystery
narrow nation nature necessary necklace needle neighbor nephew nervous network neutral nickel nobody noise noodle
normal northern nothing notice november number nursery object obvious occasion occurred ocean october octopus office
onion opinion opposite orange orchard orchestra ordinary organize original ostrich outside oxygen package paddle
painting palace pancake panther paper parachute paragraph parallel parent parliament parrot passenger pattern pavement
peanut pebble penguin pepper perfect performance perhaps period permanent person phone photograph phrase physical piano
picnic picture pigeon pillow pilot pineapple pioneer planet plastic platform pleasure pocket poem poison police politics
pollution popular porcupine portrait position possess potato poverty practice precious prefer prepare present president
pretty prince principal printer privilege problem produce professor profit program promise pronounce property protect
province public pumpkin puppet purchase purple puzzle pyramid quality quarter queen question quick quiet quilt rabbit
raccoon radio railway rainbow raspberry reach realize reason receive recipe recommend record rectangle recycle referee
reflect region regular relative remember repair repeat reptile republic rescue research respect restaurant result
return rhythm ribbon river robin rocket romance rooster rough routine rubber runner saddle safety salmon sandal sandwich
satellite saturday sausage scarf scatter schedule scholar school science scissors season secret sentence separate
september serious service seven several shadow shallow sheep shelter shoulder shower sibling signal silence silver
similar simple sister sketch skill sleeve smooth snowflake soccer society soldier solution someone sparrow special
spider spinach spirit squirrel stadium station statue stomach storage strange strawberry stream street strength student
subject success sudden suggest suitcase summer sunflower sunset surface surprise swallow sweater swimming symbol
syllable system table tailor talent teacher technology telephone temperature temple tennis terrible textbook theater
thermometer thirteen thousand thread thunder tickle tiger tobacco together tomato tomorrow tongue toothbrush tornado
tortoise tournament toward tractor tradition traffic transfer travel treasure triangle trumpet tuesday tulip tunnel
turkey turtle twelve twilight umbrella uncle understand uniform universe unusual upstairs useful usual vacation valley
valuable vanilla vehicle velvet victory village vinegar violin visible visitor vocabulary volcano volleyball volunteer
voyage waffle walnut wander warning waterfall weather wedding wednesday weekend welcome whale whisper whistle wilderness
window winner winter wisdom wizard wonder wooden woodpecker worker worry wrinkle writer yellow yesterday yogurt younger
zebra zucchini
"""
WORDS: tuple[str, ...] = tuple(_TEXT.split())
